"""Images: every layout that can be read, what bad ones are answered with, and which images an epoch holds."""

import shutil
import struct
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from engine.images.augment import Augmentation, normalise
from engine.images.batches import Data, ImagesInMemory, ImagesOnDisk
from engine.images.datasets import DATA_PATH, DATASETS
from engine.program.errors import UserError
from helpers.images import CLASSES, PHOTO, drawn, equal, load, pixels, random_image, refusal
from model import row_of

FOLDER_NAMES = [name for name in DATASETS if name not in ("digits", "ImageNet")]


# ------------------------------------------------------------------------------------- small class folders


@pytest.mark.parametrize("name", FOLDER_NAMES)
@pytest.mark.parametrize("val", ["val", "test"])
def test_class_folders_are_read_under_every_name(name, val, make_folders):
    path = make_folders(classes=("b", "a", "c"), splits=("train", val))
    data = load(path, name, image_size=8)
    assert isinstance(data, ImagesInMemory) and data.classes == ["a", "b", "c"]
    for split, (images, labels) in (("train", data.train), (val, data.val)):
        assert labels.tolist() == [0, 0, 1, 1, 2, 2]
        files = [path / split / label / f"{i}.png" for label in "abc" for i in (0, 1)]
        assert torch.equal(images, torch.stack([pixels(file) for file in files]))


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("CIFAR10", {}, "2 classes, 4 training images and 4 validation images of 32 px"),
        ("CIFAR10", {"train": False}, "2 classes, 4 validation images of 32 px"),
        (
            "ImageNet",
            {"image_size": 16, "val_image_size": 24},
            "2 classes, 4 training images of 16 px and 4 validation images of 24 px",
        ),
    ],
)
def test_what_was_read_is_said(name, options, said, make_folders, capsys):
    path = make_folders()
    load(path, name, **options)
    assert capsys.readouterr().out == f"{name} in {path}: {said}\n"


@pytest.mark.parametrize("name, size", [("CIFAR10", 32), ("folder", 8)])
def test_size_unless_told(name, size, make_folders):
    assert load(make_folders(), name).image_size == size
    assert load(make_folders(), name, image_size=5).train[0].shape == (4, 3, 5, 5)


def test_images_of_mixed_sizes_become_one_size(make_folders):
    path = make_folders()
    random_image((30, 12)).save(path / "train" / "cat" / "1.png")
    random_image((1, 1)).save(path / "test" / "dog" / "1.png")
    data = load(path)
    assert data.train[0].shape == data.val[0].shape == (4, 3, 8, 8)
    lonely = pixels(path / "test" / "dog" / "1.png")
    assert torch.equal(data.val[0][3], lonely.expand(3, 8, 8))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode, make_folders):
    suffix = "tif" if mode == "CMYK" else "png"
    path = make_folders(mode=mode, suffix=suffix)
    images, _ = load(path).train
    assert torch.equal(images[0], pixels(path / "train" / "cat" / f"0.{suffix}"))
    assert (mode in ("L", "LA")) == bool((images == images[:, :1]).all())


def test_16_bit_grey_is_not_cut_off(make_folders):
    path = make_folders()
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16).repeat(4, axis=0)
    Image.fromarray(values).save(path / "train" / "cat" / "0.png")
    images, _ = load(path, image_size=4).train
    assert images[0, :, 0].tolist() == [[0, 1, 128, 255]] * 3


def test_a_palette_with_transparency_and_a_wrong_suffix(make_folders):
    path = make_folders()
    palette = random_image().quantize(16)
    palette.save(path / "train" / "cat" / "0.png", transparency=3)
    random_image(seed=1).save(path / "train" / "cat" / "1.jpg", format="PNG")
    (path / "train" / "cat" / "1.png").unlink()
    expected = np.where(np.array(palette)[..., None] == 3, 255, np.array(palette.convert("RGB")))
    images, _ = load(path).train
    assert torch.equal(images[0], torch.from_numpy(expected.astype(np.uint8)).movedim(2, 0))
    assert torch.equal(images[1], torch.from_numpy(np.array(random_image(seed=1))).movedim(2, 0))


def test_hidden_files_and_folders_do_not_count_and_nested_ones_do(make_folders, capsys):
    path = make_folders()
    (path / "train" / ".ipynb_checkpoints").mkdir()
    (path / "train" / "cat" / "._0.png").write_bytes(b"of another system")
    (path / "train" / "cat" / "readme.txt").write_text("no image")
    (path / "train" / "cat" / "more").mkdir()
    random_image().save(path / "train" / "cat" / "more" / "9.PNG")
    (path / "train" / "dog" / "moving.gif").write_bytes(b"left out")
    data = load(path)
    assert data.classes == ["cat", "dog"] and data.train[1].tolist() == [0, 0, 0, 1, 1]
    left_out = f"{path}/train: 2 files are left out, they are not named as images (.gif, .txt)\n"
    assert left_out in capsys.readouterr().out


# ------------------------------------------------------------------------------------- other data sets


@pytest.mark.parametrize("size", [8, 16])
def test_digits(size, tmp_path):
    data = load(Path(DATA_PATH), "digits", image_size=size)
    assert data.classes == list("0123456789")
    assert len(data.train[1]) + len(data.val[1]) == 1797
    for images, labels in (data.train, data.val):
        assert images.shape == (len(labels), 3, size, size) and torch.equal(images[:, 0], images[:, 2])
    assert max(Counter(data.val[1].tolist()).values()) <= 37 and min(Counter(data.val[1].tolist()).values()) >= 35


def test_digits_of_a_folder_are_not_the_built_in_ones(make_folders):
    assert "--dataset digits comes with scikit-learn, not from a folder" in refusal(make_folders(), "digits")


def test_no_digit_is_in_both_halves_or_lost(tmp_path):
    data = load(Path(DATA_PATH), "digits", image_size=8)
    ours = Counter(image[0].numpy().tobytes() for images, _ in (data.train, data.val) for image in images)
    original = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert ours == Counter(image.tobytes() for image in original)


def write_idx(path: Path, values: np.ndarray) -> None:
    """A file as MNIST's, uncompressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes())


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_torchvisions_own_files_become_32_px_and_three_channels(name, tmp_path):
    grey = np.full((5, 28, 28), 40, dtype=np.uint8) * np.arange(1, 6, dtype=np.uint8)[:, None, None]
    for prefix, labels in (("train", [3, 1, 4, 1, 5]), ("t10k", [9, 2, 6, 5, 3])):
        write_idx(tmp_path / name / "raw" / f"{prefix}-images-idx3-ubyte", grey)
        write_idx(tmp_path / name / "raw" / f"{prefix}-labels-idx1-ubyte", np.array(labels, dtype=np.uint8))
    data = load(tmp_path, name)
    assert len(data.classes) == 10
    assert data.train[1].tolist() == [3, 1, 4, 1, 5] and data.val[1].tolist() == [9, 2, 6, 5, 3]
    for images, _ in (data.train, data.val):
        assert images.dtype == torch.uint8 and images.shape == (5, 3, 32, 32)
        assert [image.unique().tolist() for image in images] == [[40], [80], [120], [160], [200]]


def test_torchvisions_damaged_files_are_an_error(tmp_path):
    for file in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)
        (tmp_path / "MNIST" / "raw" / f"{file}-ubyte").write_bytes(b"\0\0\x08\x03")
    assert refusal(tmp_path, "MNIST").startswith(f"{tmp_path}: MNIST can't be read there")


# ------------------------------------------------------------------------------------- what bad folders are told


@pytest.mark.parametrize("name", ["folder", "ImageNet"])
@pytest.mark.parametrize("there", [True, False])
def test_a_missing_or_empty_folder_is_named(name, there, tmp_path):
    path = tmp_path / "images"
    if there:
        path.mkdir()
    message = refusal(path, name)
    assert message.startswith(f"{path}: {'no class folders' if there else 'no such folder'} for --dataset {name} ")
    assert "train/ and val/ or test/" in message and "--data-path" in message


@pytest.mark.parametrize("splits", [("train",), ("test",)])
def test_training_needs_both_halves(splits, make_folders):
    assert "looked for train/ and val/ or test/" in refusal(make_folders(splits=splits))


def test_evaluation_needs_the_validation_images_only(make_folders):
    data = load(make_folders(splits=("val",)), train=False)
    assert data.train is None and len(data.val[1]) == 4
    photographs = load(make_folders("photographs", splits=("val",)), "ImageNet", image_size=8, train=False)
    assert photographs.train is None and sum(len(labels) for _, labels in photographs.val_batches()) == 4


def test_halves_without_classes_are_named(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    assert refusal(tmp_path).startswith(f"{tmp_path}/train: holds no class folders")


@pytest.mark.parametrize("name", ["folder", "CIFAR100", "ImageNet"])
@pytest.mark.parametrize("lacking, having", [("train", "test"), ("test", "train")])
def test_different_classes_are_named(name, lacking, having, make_folders):
    path = make_folders(classes=("ant", "bee", "cat"))
    shutil.rmtree(path / lacking / "bee")
    message = refusal(path, name)
    assert f"{path}/train and {path}/test hold different classes" in message
    assert f"bee is missing in {path}/{lacking})" in message


@pytest.mark.parametrize("name", ["folder", "ImageNet"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_images_is_named(name, split, make_folders):
    path = make_folders()
    for file in (path / split / "dog").iterdir():
        file.rename(file.with_suffix(".gif"))
    assert f"{path}/{split}/dog: holds no images (.jpg, " in refusal(path, name)


BROKEN = {
    "empty": lambda data: b"",
    "text": lambda data: b"404 not found",
    "half": lambda data: data[: len(data) // 2],
    "scratched": lambda data: data[:60] + bytes(len(data) - 60),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_small_image_that_does_not_decode_is_named(damage, split, make_folders):
    path = make_folders()
    file = path / split / "dog" / "1.png"
    file.write_bytes(damage(file.read_bytes()))
    assert refusal(path, workers=2).startswith(f"{file}: does not decode as an image (")


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_photograph_that_does_not_decode_is_named_once_it_is_met(damage, workers, split, make_folders):
    path = make_folders(size=PHOTO, suffix="jpg")
    file = path / split / "dog" / "1.jpg"
    data = load(path, image_size=16, workers=workers)
    file.write_bytes(damage(file.read_bytes()))
    assert refusal(path, workers=workers).startswith(f"{file}: does not decode as an image (")  # at the next start
    with pytest.raises(UserError) as caught:
        list(data.train_batches(0) if split == "train" else data.val_batches())
    assert str(caught.value).startswith(f"{file}: does not decode as an image (")
    assert len(str(caught.value).splitlines()) == 1


# ------------------------------------------------------------------------------------- what an epoch holds


@pytest.fixture(params=["small", "photographs", "photographs, 2 workers"])
def eleven(request, make_folders) -> Data:
    """Eleven images of a class each, in batches of 2."""
    small = request.param == "small"
    path = make_folders(classes=CLASSES, number=1, size=(8, 8) if small else PHOTO, suffix="png" if small else "jpg")
    data = load(path, image_size=8, workers=2 if "workers" in request.param else 0)
    assert isinstance(data, ImagesInMemory if small else ImagesOnDisk)
    return data


def labels_of(batches) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches]


def test_an_epoch_holds_every_image_once_in_whole_batches(eleven):
    batches = labels_of(eleven.train_batches(seed=0))
    assert [len(batch) for batch in batches] == [2] * 5 == [2] * eleven.num_train_batches
    seen = [label for batch in batches for label in batch]
    assert len(set(seen)) == 10 and set(seen) < set(range(11)) and seen != sorted(seen)
    epochs = (chain.from_iterable(labels_of(eleven.train_batches(seed))) for seed in range(8))
    left_out = {(set(range(11)) - set(epoch)).pop() for epoch in epochs}
    assert len(left_out) > 1, "the incomplete batch must be another one in every epoch"


def test_evaluation_sees_every_image_once_in_order(eleven):
    assert labels_of(eleven.val_batches()) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    assert (eleven.num_val_batches, eleven.num_val_images) == (4, 11)


def test_some_validation_images_are_spread_over_all(eleven):
    """Class folders are read one after the other: the first images would be those of the first classes."""
    assert labels_of(eleven.spread(4).val_batches()) == [[1, 4, 6], [9]]
    assert labels_of(eleven.spread(99).val_batches()) == labels_of(eleven.val_batches())
    assert labels_of(eleven.spread(4).train_batches(0)) == labels_of(eleven.train_batches(0))


def test_the_seed_alone_decides(eleven):
    torch.manual_seed(1)
    first = drawn(eleven, 7)
    torch.manual_seed(2)
    assert equal(first, drawn(eleven, 7))
    assert not equal(first, drawn(eleven, 8))


def test_reading_leaves_the_global_random_stream_alone(eleven):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    drawn(eleven, 7), list(eleven.val_batches())
    assert torch.equal(torch.rand(3), expected)


def test_fewer_images_than_a_batch_are_one_batch(make_folders):
    for size, suffix in (((8, 8), "png"), (PHOTO, "jpg")):
        data = load(make_folders(suffix, size=size, suffix=suffix), image_size=8, batch_size=100)
        assert data.num_train_batches == 1
        assert [sorted(batch) for batch in labels_of(data.train_batches(0))] == [[0, 0, 1, 1]]


def test_batches_of_one_image(make_folders):
    data = load(make_folders(), batch_size=1, val_batch_size=1)
    assert len(list(data.train_batches(0))) == len(list(data.val_batches())) == 4


def test_the_followup_augments_cifar10_as_cifar100(make_folders):
    path = make_folders()
    plain, other, followup = load(path, "CIFAR10"), load(path, "CIFAR100"), load(path, "CIFAR10", augment_as="followup")
    assert followup.augmentation == other.augmentation == Augmentation(True, 4, (0.3, 0.3, 0.3, 0.075), 16)
    assert plain.augmentation == Augmentation(True, 4) and followup.digest == plain.digest
    said = refusal(path, "CIFAR100", augment_as="followup")
    assert said == "--augment-as followup: differs for CIFAR10 alone, not for CIFAR100; leave it out"


def test_small_images_are_augmented_as_another_data_set_on_request(make_folders):
    path = make_folders()
    for name in ("CIFAR100", "folder", "MNIST"):
        assert load(path, name, image_size=32, augment_as="CIFAR10").augmentation == Augmentation(True, 4)
        assert (
            load(path, name, image_size=32, augment_as="CIFAR100").augmentation == load(path, "CIFAR100").augmentation
        )


def test_photographs_are_augmented_as_published_alone(make_folders):
    path = make_folders(size=PHOTO, suffix="jpg")
    for name in ("folder", "ImageNet"):
        said = refusal(path, name, augment_as="CIFAR10")
        assert said == "--augment-as CIFAR10: small images only, not photographs; leave it out"


def test_small_validation_images_are_normalised_and_nothing_else(make_folders):
    data = load(make_folders())
    images = torch.cat([images for images, _ in data.val_batches()])
    assert torch.equal(images, normalise(data.val[0])) and images.dtype == torch.float32


@pytest.mark.parametrize(
    "model, red, green, blue",
    [
        ("resnet20", 129.7 / 63.0, -123.0 / 62.1, -62.9 / 66.7),
        ("efficientnet-b1", 0.515 / 0.229, -0.456 / 0.224, -0.206 / 0.225),
        ("efficientnet-lite1", (255 - 127) / 128, -127 / 128, (51 - 127) / 128),
    ],
)
def test_small_images_are_normalised_as_the_network_knows_them(model, red, green, blue, make_folders):
    path = make_folders()
    for file in path.rglob("*.png"):
        Image.new("RGB", (8, 8), (255, 0, 51)).save(file)
    data = load(path, preprocessing=row_of(model).preprocessing)
    colour = torch.tensor([red, green, blue]).view(3, 1, 1)
    (val, _), (train, _) = next(data.val_batches()), next(data.train_batches(0))
    torch.testing.assert_close(val, colour.expand_as(val))
    centre = train[:, :, 1:-1, 1:-1]  # padded by 1 px
    torch.testing.assert_close(centre, colour.expand_as(centre))


# ------------------------------------------------------------------------------------- telling data sets apart


def test_other_photographs_under_the_same_names_are_another_data_set(make_folders):
    paths = [make_folders(name, size=size, suffix="jpg") for name, size in (("160", (160, 160)), ("320", (320, 320)))]
    assert len({load(path, "ImageNet").digest for path in paths}) == 2


@pytest.mark.parametrize("name", ["CIFAR10", "ImageNet"])
def test_the_digest_tells_the_images_not_their_place(name, make_folders, tmp_path):
    path = make_folders()
    before = load(path, name, image_size=8).digest
    path.rename(tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere", name, image_size=8).digest == before
    random_image(seed=99).save(tmp_path / "elsewhere" / "train" / "cat" / "9.png")
    assert load(tmp_path / "elsewhere", name, image_size=8).digest != before
