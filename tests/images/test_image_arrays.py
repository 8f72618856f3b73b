"""Small images in `.npz` files: as a data set, and as the cache of class folders."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.program.errors import UserError
from helpers.images import load, random_image


def pack(path: Path, split: str, number: int = 6, size: int = 8, **replaced) -> dict:
    """Write `split`.npz of random images of two classes, with some entries replaced, or left out where None."""
    images = np.random.default_rng(number).integers(0, 256, (number, size, size, 3), dtype=np.uint8)
    content = {"images": images, "labels": np.arange(number) % 2, "classes": np.array(["cat", "dog"])} | replaced
    path.mkdir(exist_ok=True)
    np.savez(path / f"{split}.npz", **{key: value for key, value in content.items() if value is not None})
    return content


def test_arrays_are_a_data_set(tmp_path):
    train, test = pack(tmp_path, "train", 7), pack(tmp_path, "test", 4)
    data = load(tmp_path)
    assert data.classes == ["cat", "dog"] and data.image_size == 8
    for (images, labels), content in ((data.train, train), (data.val, test)):
        assert np.array_equal(images.movedim(1, 3), content["images"]) and np.array_equal(labels, content["labels"])
    assert load(tmp_path, image_size=4).val[0].shape == (4, 3, 4, 4)
    (tmp_path / "train.npz").unlink()
    assert load(tmp_path, train=False).train is None


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"labels": None}, "holds no arrays of images"),
        ({"classes": np.array([print, len], dtype=object)}, "holds no arrays of images"),
        ({"images": np.zeros((6, 8, 8, 3))}, "float64"),
        ({"images": np.zeros((6, 3, 8, 8), np.uint8)}, "not as uint8"),
        ({"labels": np.array([0, 1, 2, 0, 1, 0])}, "its labels"),
        ({"labels": np.array([0, 1])}, "its labels"),
        ({"classes": np.array(["cat", "cow"])}, "different classes"),
    ],
)
def test_what_is_no_data_set_is_refused(tmp_path, replaced, words):
    pack(tmp_path, "train", **replaced)
    pack(tmp_path, "test")
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path)
    assert "train.npz" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_truncated_file_is_refused(tmp_path):
    pack(tmp_path, "train")
    pack(tmp_path, "test")
    file = tmp_path / "test.npz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"test\.npz: holds no arrays of images"):
        load(tmp_path)


def test_class_folders_are_decoded_once(make_folders, monkeypatch):
    path = make_folders()
    first = load(path)
    assert len(list((path / ".cache").glob("*.npz"))) == 2
    monkeypatch.setattr("engine.images.sources.decode_all", None)  # whoever decodes now fails
    again = load(path)
    for one, two in ((first.train, again.train), (first.val, again.val)):
        assert all(map(torch.equal, one, two))
    assert first.digest == again.digest


def test_a_changed_image_is_decoded_again(make_folders):
    path = make_folders()
    load(path)
    changed = path / "train" / "dog" / "1.png"
    random_image(seed=99).save(changed)
    os.utime(changed, ns=(0, 0))
    images, _ = load(path).train
    assert torch.equal(images[3], torch.from_numpy(np.array(random_image(seed=99))).movedim(2, 0))
    assert len(list((path / ".cache").iterdir())) == 3, "the outdated cache must go"


def test_a_damaged_cache_is_made_again(make_folders):
    path = make_folders()
    first = load(path)
    for file in (path / ".cache").iterdir():
        file.write_bytes(b"PK damaged")
    assert load(path).digest == first.digest
