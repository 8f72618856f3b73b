"""Photographs, and Tiny-ImageNet as it comes: what a network sees of them."""

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from engine.images.batches import ImagesInMemory, ImagesOnDisk
from engine.program.errors import UserError
from helpers.images import CLASSES, PHOTO, drawn, equal, load, pixels, random_image, refusal
from model import row_of

# ------------------------------------------------------------------------------------- Tiny-ImageNet's layout


@pytest.fixture
def tiny_imagenet(make_folders) -> Path:
    """Its layout: train/CLASS/images/, val/images/ with val_annotations.txt, test/images/ without labels."""
    path = make_folders(splits=("train/n2/images", "train/n1/images", "test"), classes=("",), number=3)
    (path / "train" / "n1" / "n1_boxes.txt").write_text("n1_0.JPEG\t0\t0\t7\t7\n")
    (path / "val" / "images").mkdir(parents=True)
    lines = []
    for i, label in enumerate(["n2", "n1", "n2", "n2"]):
        random_image(seed=50 + i).save(path / "val" / "images" / f"val_{i}.png")
        lines.append(f"val_{i}.png\t{label}\t0\t0\t7\t7\n")
    (path / "val" / "val_annotations.txt").write_text("".join(lines))
    return path


@pytest.mark.parametrize("name", ["folder", "ImageNet"])
def test_tiny_imagenet_is_read_as_it_comes(name, tiny_imagenet):
    data = load(tiny_imagenet, name, image_size=8, val_batch_size=4)
    assert data.classes == ["n1", "n2"]
    images, labels = next(data.val_batches())
    assert len(images) == 4 and labels.tolist() == [1, 0, 1, 1]
    assert (
        sorted(drawn(data, 0)[1].tolist() + drawn(data, 0)[3].tolist() + drawn(data, 0)[5].tolist())
        == [0] * 3 + [1] * 3
    )


def test_tiny_imagenets_images_get_the_labels_of_its_list(tiny_imagenet):
    images, labels = load(tiny_imagenet).val
    expected = [pixels(tiny_imagenet / "val" / "images" / f"val_{i}.png") for i in range(4)]
    assert torch.equal(images, torch.stack(expected)) and labels.tolist() == [1, 0, 1, 1]
    cached_images, cached_labels = load(tiny_imagenet).val
    assert torch.equal(cached_images, images) and torch.equal(cached_labels, labels)


def test_tiny_imagenets_validation_images_are_enough_where_nothing_is_trained(tiny_imagenet):
    shutil.rmtree(tiny_imagenet / "train")
    assert load(tiny_imagenet, train=False).classes == ["n1", "n2"]


def test_what_is_no_list_of_tiny_imagenets_is_named(tiny_imagenet):
    (tiny_imagenet / "val" / "val_annotations.txt").write_text("val_0.png n1\n")
    assert "val_annotations.txt: has a line that is not a file's name, a tab" in refusal(tiny_imagenet)


# ------------------------------------------------------------------------------------- photographs


def test_a_folder_is_of_photographs_where_its_images_are_large(make_folders):
    assert isinstance(load(make_folders("64", size=(64, 64))), ImagesInMemory)
    large = load(make_folders("65", size=(65, 20)))
    assert isinstance(large, ImagesOnDisk) and large.image_size == 224
    assert isinstance(load(make_folders("8", size=(8, 8)), "ImageNet", image_size=8), ImagesOnDisk)


@pytest.mark.parametrize(
    "model, red, green, blue",
    [
        ("resnet20", 0.515 / 0.229, -0.456 / 0.224, -0.206 / 0.225),
        ("efficientnet-b1", 0.515 / 0.229, -0.456 / 0.224, -0.206 / 0.225),
        ("efficientnet-lite1", (255 - 127) / 128, -127 / 128, (51 - 127) / 128),
    ],
)
@pytest.mark.parametrize("val_size", [None, 21])
def test_photographs_are_cropped_to_size_and_normalised(model, red, green, blue, val_size, make_folders):
    path = make_folders()
    for file in path.rglob("*.png"):
        Image.new("RGB", PHOTO, (255, 0, 51)).save(file)
    data = load(path, "ImageNet", image_size=14, val_image_size=val_size, preprocessing=row_of(model).preprocessing)
    colour = torch.tensor([red, green, blue])
    for batches, size in ((data.train_batches(0), 14), (data.val_batches(), val_size or 14)):
        for images, _ in batches:
            assert images.shape[1:] == (3, size, size)
            torch.testing.assert_close(images, colour.view(3, 1, 1).expand_as(images))


def test_the_centre_of_a_photograph_is_seen(make_folders):
    path = make_folders()
    photograph = Image.new("RGB", (160, 80), "blue")
    photograph.paste("red", (60, 20, 100, 60))
    for file in path.rglob("*.png"):
        photograph.save(file)
    # of the shorter side that the crop shows
    for model, share in (
        ("resnet20", 7 / 8),
        ("imagenet_micronet", 1),
        ("efficientnet-b4", 1),
        ("efficientnet-lite1", 56 / 88),
    ):
        data = load(path, "ImageNet", image_size=56, preprocessing=row_of(model).preprocessing)
        images, _ = next(data.val_batches())
        red = (images[0, 0] > 0).float().mean().sqrt().item()
        assert red == pytest.approx(40 / (80 * share), abs=0.04)


ODD = {
    "cmyk.jpg": lambda path: random_image(PHOTO, "CMYK").save(path),
    "grey.jpg": lambda path: random_image(PHOTO, "L").save(path),
    "one pixel.png": lambda path: random_image((1, 1)).save(path),
    "a line.png": lambda path: random_image((300, 1)).save(path),
    "transparent.png": lambda path: random_image(PHOTO).quantize(16).save(path, transparency=bytes(range(16))),
    "a png.jpg": lambda path: random_image(PHOTO, "RGBA").save(path, format="PNG"),
    "16 bit.png": lambda path: Image.fromarray(np.full((20, 20), 999, dtype=np.uint16)).save(path),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_odd_photographs_are_read(workers, make_folders):
    path = make_folders(size=PHOTO, number=1)
    for split in ("train", "test"):
        for name, write in ODD.items():
            write(path / split / "dog" / name)
    data = load(path, "ImageNet", image_size=16, workers=workers, batch_size=3)
    for batches, number in ((data.train_batches(0), 9), (data.val_batches(), 9)):
        images = torch.cat([images for images, _ in batches])
        assert images.shape == (number, 3, 16, 16) and torch.isfinite(images).all()


def test_odd_small_images_are_read(make_folders, recwarn):
    path = make_folders(number=1, size=PHOTO)
    for name, write in ODD.items():
        write(path / "test" / "dog" / name)
    data = load(path, "CIFAR10", workers=2)
    assert data.val[0].shape == (9, 3, 32, 32) and len(data.val[0].unique(dim=0)) == 9
    assert [str(warning.message) for warning in recwarn] == []  # of the palette


def beside_torchvision(data: ImagesOnDisk, size: int) -> list[np.ndarray]:
    """Each training image less what torchvision makes of the same photograph with the same draws."""
    theirs = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()])
    differences = []
    for i, (file, label) in enumerate(data.train.files):
        image, drawn_label = replace(data.train, seed=70)[i]
        assert drawn_label == label
        torch.manual_seed(70 + i)
        with Image.open(file) as photograph:
            differences.append(np.asarray(image, dtype=int) - np.asarray(theirs(photograph), dtype=int))
    return differences


def test_training_images_are_those_of_torchvision(make_folders):
    path = make_folders(number=2, size=(120, 90), suffix="jpg")
    data = load(path, image_size=56)  # more than half of any part: decoded in full
    assert not any(difference.any() for difference in beside_torchvision(data, 56))


def test_photographs_much_larger_than_their_image_are_decoded_at_a_reduced_scale(make_folders):
    path = make_folders(number=2, size=(480, 360), suffix="jpg")
    for difference in beside_torchvision(load(path, image_size=8), 8):
        assert difference.any() and np.abs(difference).mean() < 3


def test_every_photograph_gets_its_own_draws(make_folders):
    path = make_folders(number=4, size=PHOTO)
    for file in path.rglob("*.png"):
        random_image(PHOTO).save(file)  # the same in all files
    images = torch.cat([images for images, _ in load(path, image_size=8).train_batches(0)])
    assert len(images.unique(dim=0)) == 8


def test_the_number_of_workers_changes_nothing(make_folders):
    path = make_folders(classes=CLASSES, number=1, size=PHOTO, suffix="jpg")
    epochs = [drawn(load(path, "ImageNet", image_size=8, workers=workers), 7) for workers in (0, 1, 2)]
    assert equal(epochs[0], epochs[1]) and equal(epochs[0], epochs[2])


def test_workers_outlive_the_ctrl_c_that_reaches_them(make_folders):
    data = load(make_folders(number=4, size=PHOTO), image_size=8, workers=2)
    batches = data.train_batches(0)
    count = len(next(batches)[1])
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    assert count + sum(len(labels) for _, labels in batches) == 8


def test_a_photograph_that_is_gone_ends_the_workers_at_once(make_folders):
    path = make_folders(number=4, size=PHOTO)
    data = load(path, image_size=8, workers=2)
    gone = path / "test" / "dog" / "3.png"
    gone.unlink()
    with pytest.raises(UserError) as caught:
        list(data.val_batches())
    assert str(caught.value) == f"{gone}: is gone; restore it, or begin a run without it"
    assert not multiprocessing.active_children()
