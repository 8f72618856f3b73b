"""Where images come from: class folders, `.npz` files, torchvision's data sets, scikit-learn's digits.

Each source knows its `classes` and its `native_size` in pixels (None where that is not one size), and reads the
split "train" or "val" as uint8 images `[N, 3, size, size]` and int64 labels `[N]`.
"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets

from engine.images.arrays import ImageArrays, cached, find_arrays, read_arrays
from engine.images.datasets import DATA_PATH
from engine.program.errors import UserError
from engine.program.report import say

SMALL_IMAGE_SIZE = 32  # px, of CIFAR; MNIST and the digits are enlarged to it


class Source(Protocol):
    classes: list[str]
    native_size: int

    def read(self, split: str, size: int) -> tuple[Tensor, Tensor]: ...


def find_source(name: str, path: Path, with_train: bool, threads: int) -> Source:
    """The data set `name` in `path`; UserError where it is missing, empty or damaged.

    Folders and `.npz` files in `path` go before what the name stands for.

    Args:
        with_train: the training split is wanted too; without it, classes may lack images.
        threads: how many decode small images of class folders.
    """
    if name == "digits":
        if path != Path(DATA_PATH):
            raise UserError(
                f"--data-path {path}: --dataset digits comes with scikit-learn, not from a folder; "
                f"pass --dataset folder for the images there"
            )
        return Digits()
    if splits := _class_folders(path, with_train):
        return ClassFolders(*splits, with_train, threads, None if name == "folder" else SMALL_IMAGE_SIZE)
    if name != "ImageNet" and (files := find_arrays(path, with_train)):
        return ArrayFiles(*files, None if name == "folder" else SMALL_IMAGE_SIZE)
    if name in ("ImageNet", "folder"):
        looked_for = "train/ and val/ or test/" if with_train else "val/ or test/"
        lacking = "no such folder" if not path.is_dir() else "no train/" if _val(path) else "no class folders"
        raise UserError(
            f"{path}: {lacking} for --dataset {name} (looked for {looked_for} with one folder a class); "
            f"pass the folder that holds them as --data-path"
        )
    return Torchvision(name, path)


class ClassFolders:
    """Image files, one folder a class (or as Tiny-ImageNet has them); `files[split]` pairs each with its label."""

    def __init__(self, train: Path, val: Path, with_train: bool, threads: int, native_size: int | None):
        self.folders, self.threads = {"train": train, "val": val}, threads
        self.classes = _class_names(val)
        self.files = {"val": _image_files(val, self.classes, every_class=with_train)}
        if with_train:
            self.files["train"] = _image_files(train, self.classes)
        self._native_size = native_size
        if lacking := len(self.classes) - len({label for _, label in self.files["val"]}):
            say(f"{val}: {lacking:,} of {len(self.classes):,} classes have no images")

    @cached_property
    def largest_side(self) -> int:
        """Of the first image, in pixels."""
        return max(open_image(self.files["val"][0][0]).size)

    @property
    def native_size(self) -> int:
        return self._native_size or self.largest_side

    def read(self, split: str, size: int) -> tuple[Tensor, Tensor]:
        """Images become squares of `size` px; they are decoded the first time only."""
        files = self.files[split]
        arrays = cached(self.folders[split], size, files, self.classes, lambda: _decode_all(files, size, self.threads))
        return _tensors(*arrays)


class ArrayFiles:
    """One `.npz` file a split, as `engine.images.arrays` describes them."""

    def __init__(self, train: Path, val: Path, native_size: int | None):
        self._splits: dict[str, ImageArrays] = {"train": read_arrays(train), "val": read_arrays(val)}
        self.classes = self._splits["val"].classes
        if self._splits["train"].classes != self.classes:
            raise UserError(f"{train} and {val} hold different classes; pack them from the same set")
        self.native_size = native_size or self._splits["val"].images.shape[1]

    def read(self, split: str, size: int) -> tuple[Tensor, Tensor]:
        images, labels = _tensors(*self._splits[split][:2])
        return _resized(images, size), labels


class Digits:
    """Scikit-learn's 1,797 handwritten digits of 8 px, enlarged; a fixed stratified fifth is held out."""

    classes = [str(digit) for digit in range(10)]
    native_size = SMALL_IMAGE_SIZE

    def read(self, split: str, size: int) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        bunch = load_digits()
        halves = train_test_split(np.arange(len(bunch.target)), test_size=0.2, stratify=bunch.target, random_state=0)
        indices = halves[split == "val"]
        images = torch.from_numpy(bunch.images[indices]).float().mul(255 / 16)[:, None]
        return _resized(images, size).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(bunch.target[indices]).long()


class Torchvision:
    """One of torchvision's data sets, downloaded where there is a network; grey images get three channels."""

    native_size = SMALL_IMAGE_SIZE

    def __init__(self, name: str, path: Path):
        self._splits = {"train": self._open(name, path, True), "val": self._open(name, path, False)}
        self.classes = list(self._splits["val"].classes)

    def read(self, split: str, size: int) -> tuple[Tensor, Tensor]:
        images = torch.as_tensor(np.asarray(self._splits[split].data))
        images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.movedim(3, 1)
        return _resized(images, size).contiguous(), torch.as_tensor(self._splits[split].targets).long()

    @staticmethod
    def _open(name: str, path: Path, train: bool) -> datasets.VisionDataset:
        folders = [path / name / "raw", path / name, path]
        made_here = [folder for folder in folders if not folder.exists()]
        try:
            return getattr(datasets, name)(path, train=train, download=True)
        except Exception as error:  # of the network, of archives, of damaged files
            for folder in made_here:
                with suppress(OSError):  # it is not there, or holds something
                    folder.rmdir()
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{path}: {name} can't be read there, nor downloaded ({reason[:100]}); pass the folder that holds the "
                f"set, or train/ and test/ class folders, as --data-path"
            ) from None


# ------------------------------------------------------------------------------------- finding files


def _class_folders(path: Path, with_train: bool) -> tuple[Path, Path] | None:
    """The training and the validation folder under `path`, checked to hold the same classes; None if not there.

    Where there is only a validation folder, and only that is wanted, it stands for both.
    """
    train, val = path / "train", _val(path)
    if val is None or with_train and not train.is_dir():
        return None
    splits = (train, val) if train.is_dir() else (val, val)
    names = [_class_names(split) for split in splits]
    for split, classes in zip(splits, names):
        if not classes:
            raise UserError(f"{split}: holds no class folders; put each class's images in a folder of its own")
    if different := sorted(set(names[0]) ^ set(names[1])):
        missing_in = val if different[0] in names[0] else train
        raise UserError(
            f"{train} and {val} hold different classes ({len(names[0])} and {len(names[1])}; "
            f"{different[0]} is missing in {missing_in}); make them the same"
        )
    return splits


def _val(path: Path) -> Path | None:
    return next((folder for folder in (path / "val", path / "test") if folder.is_dir()), None)


def _class_names(split: Path) -> list[str]:
    if annotations := _annotations(split):
        return sorted(set(annotations.values()))
    return sorted(p.name for p in split.iterdir() if p.is_dir() and not p.name.startswith("."))


def _annotations(split: Path) -> dict[str, str]:
    """Class by file name, where `split` is laid out as Tiny-ImageNet's val/; else nothing.

    There, val_annotations.txt has a line for each file in images/: its name, its class and a box, between tabs.
    """
    listing = split / f"{split.name}_annotations.txt"
    if not listing.is_file():
        return {}
    lines = [line.split("\t") for line in listing.read_text(errors="replace").splitlines() if line]
    if any(len(line) < 2 for line in lines):
        raise UserError(f"{listing}: has a line that is not a file's name, a tab and its class; mend or remove it")
    return {name: label for name, label, *_ in lines}


def _image_files(split: Path, classes: Sequence[str], every_class: bool = True) -> list[tuple[str, int]]:
    """Every image file in or below the class folders under `split`, with its label; hidden files do not count.

    UserError where there is none, or, with `every_class`, where a class has none.
    """
    if annotations := _annotations(split):
        label_of = {name: label for label, name in enumerate(classes)}
        files = [(os.path.join(split, "images", name), label_of[label]) for name, label in annotations.items()]
        return sorted(files)
    files, left_out = [], Counter()
    for label, name in enumerate(classes):
        found = sorted(
            os.path.join(folder, file)
            for folder, _, names in os.walk(split / name)
            for file in names
            if not file.startswith(".")
        )
        images = [file for file in found if file.lower().endswith(datasets.folder.IMG_EXTENSIONS)]
        files += [(file, label) for file in images]
        left_out.update(Path(file).suffix for file in set(found) - set(images))
    if left_out:
        kinds = ", ".join(sorted(suffix or "no extension" for suffix in left_out))
        say(f"{split}: {left_out.total():,} files are left out, they are not named as images ({kinds})")
    lacking = set(range(len(classes))) - {label for _, label in files}
    if lacking and (every_class or not files):
        raise UserError(
            f"{split / classes[min(lacking)]}: holds no images ({', '.join(datasets.folder.IMG_EXTENSIONS)})"
        )
    return files


# ------------------------------------------------------------------------------------- decoding


def open_image(path: str) -> Image.Image:
    """Decode an image file as RGB; UserError with its path where that fails."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bit of grey, which Pillow would cut off at 255
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode == "P":  # Pillow warns of a palette with transparency unless that is kept at first
                image = image.convert("RGBA")
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: is gone; put it back, or begin a run without it") from None
    except Exception as error:  # decoders raise whatever the damaged bytes lead to
        raise UserError(f"{path}: does not decode as an image ({error}); mend or remove it") from None


def _decode_all(files: list[tuple[str, int]], size: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Image files as uint8 `[N, size, size, 3]`, and their labels."""

    def decode(file: tuple[str, int]) -> np.ndarray:
        image = open_image(file[0])
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image)

    with ThreadPoolExecutor(threads) as pool:
        images = np.stack(list(pool.map(decode, files)))
    return images, np.array([label for _, label in files])


def _tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """uint8 images `[N, H, W, 3]` as `[N, 3, H, W]`, and their labels."""
    return torch.from_numpy(images).movedim(3, 1).contiguous(), torch.from_numpy(labels)


def _resized(images: Tensor, size: int) -> Tensor:
    """Images `[N, C, H, W]` of 0 to 255 as uint8 `[N, C, size, size]`, bicubic."""
    if images.dtype == torch.uint8 and images.shape[-2:] == (size, size):
        return images
    images = F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False)
    return images.round().clamp(0, 255).to(torch.uint8)
