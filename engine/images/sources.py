"""Where images come from: class folders, `.npz` files, torchvision's data sets, scikit-learn's digits.

Each source knows its `classes` and its `native_size`, the side of its images (of the first, where they differ) in
pixels, and reads the split "train" or "val" as uint8 images `[N, 3, size, size]` and int64 labels `[N]`.
"""

import hashlib
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.images.arrays import ImageArrays, as_tensors, cached, find_arrays, read_arrays, resized
from engine.images.datasets import DATA_PATH, DATASETS
from engine.images.decoding import decode_all, side
from engine.images.folders import class_folders, class_names, image_files, val_folder
from engine.images.survey import Survey, stamp, survey
from engine.program.errors import UserError
from engine.program.report import narrate, say

DECODED_AS = "upright, on white"  # what is cached of class folders: with other words, it is made again


class Source(Protocol):
    classes: list[str]

    @property
    def native_size(self) -> int: ...

    def read(self, split: str, size: int) -> tuple[Tensor, Tensor]: ...


def find_source(name: str, path: Path, with_train: bool, threads: int, split: str | None = None) -> Source:
    """The data set `name` in `path`; UserError where it is missing, empty or damaged.

    Folders and `.npz` files in `path` go before what the name stands for.

    Args:
        with_train: the training split is wanted too; without it, classes may lack images.
        threads: how many decode small images of class folders.
        split: the folder with the validation images, "val" or "test"; None for the first that is there.
    """
    facts = DATASETS[name]
    if facts.source == "scikit-learn":
        if path != Path(DATA_PATH):
            raise UserError(
                f"--data-path {path}: --dataset {name} comes with scikit-learn, not from a folder; "
                f"pass --dataset folder for the images there"
            )
        return Digits()
    if splits := class_folders(path, with_train, split):
        return ClassFolders(*splits, with_train, threads)
    if split:
        raise UserError(f"{path}: no {split}/ with one folder a class; leave --split out")
    if facts.photographs != "always" and (files := find_arrays(path, with_train)):
        return ArrayFiles(*files)
    if facts.source == "folder":
        looked_for = "train/ and val/ or test/" if with_train else "val/ or test/"
        lacking = "no such folder" if not path.is_dir() else "no train/" if val_folder(path) else "no class folders"
        raise UserError(
            f"{path}: {lacking} for --dataset {name} (looked for {looked_for} with one folder a class); "
            f"pass the folder that holds them as --data-path"
        )
    return Torchvision(name, path)


class ClassFolders:
    """Image files, one folder a class (or as Tiny-ImageNet has them); `files[split]` pairs each with its label.

    BadImages names those that can't be used, as far as `survey` finds them.
    """

    def __init__(self, train: Path, val: Path, with_train: bool, threads: int):
        self.folders, self.threads = {"train": train, "val": val}, threads
        self.classes = class_names(val)
        self.files = {"train": image_files(train, self.classes)} if with_train else {}
        self.files["val"] = image_files(val, self.classes, every_class=with_train)
        if lacking := len(self.classes) - len({label for _, label in self.files["val"]}):
            say(f"{val}: {lacking:,} of {len(self.classes):,} classes have no images")
        self._stamps = {split: stamp(self.folders[split], files) for split, files in self.files.items()}
        self.survey = self._look()

    @property
    def first_image(self) -> str:
        return self.files["val"][0][0]

    @cached_property
    def native_size(self) -> int:
        """The larger side of the first image, in pixels."""
        return side(self.first_image)

    @cached_property
    def median_size(self) -> int:
        """The larger side of the median image, in pixels, of about a hundred from all over the classes."""
        files = [file for files in self.files.values() for file, _ in files]
        sides = sorted(side(file) for file in files[:: max(1, len(files) // 100)])
        return sides[len(sides) // 2]

    def _look(self) -> Survey:
        root = self.folders["val"].parent
        key = hashlib.sha256(" ".join(self._stamps.values()).encode()).hexdigest()[:16]
        kept = root / ".cache" / f"{'all' if 'train' in self.files else 'val'}-{key}.json"
        found = survey(root, [file for files in self.files.values() for file in files], self.threads, kept)
        for line in found.lines:
            narrate(f"{root}: {line}")
        return found

    def read(self, split: str, size: int) -> tuple[Tensor, Tensor]:
        """Images become squares of `size` px; they are decoded the first time only."""
        folder, files, white = self.folders[split], self.files[split], self.survey.white
        key = hashlib.sha256(f"{self._stamps[split]} {white} {DECODED_AS}".encode()).hexdigest()[:16]
        cache = folder.parent / ".cache" / f"{folder.name}-{size}px-{key}.npz"
        return as_tensors(*cached(cache, self.classes, lambda: decode_all(files, size, self.threads, white)))


class ArrayFiles:
    """One `.npz` file a split, as `engine.images.arrays` describes them."""

    def __init__(self, train: Path, val: Path):
        self._splits: dict[str, ImageArrays] = {"train": read_arrays(train), "val": read_arrays(val)}
        self.classes = self._splits["val"].classes
        if self._splits["train"].classes != self.classes:
            raise UserError(f"{train} and {val} hold different classes; pack them from the same set")
        self.native_size = self._splits["val"].images.shape[1]

    def read(self, split: str, size: int) -> tuple[Tensor, Tensor]:
        images, labels = as_tensors(*self._splits[split][:2])
        return resized(images, size), labels


class Digits:
    """Scikit-learn's 1,797 handwritten digits of 8 px, enlarged; a fixed stratified fifth is held out."""

    def __init__(self) -> None:
        self.classes, self.native_size = [str(digit) for digit in range(10)], 8

    def read(self, split: str, size: int) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        bunch = load_digits()
        halves = train_test_split(np.arange(len(bunch.target)), test_size=0.2, stratify=bunch.target, random_state=0)
        indices = halves[split == "val"]
        images = torch.from_numpy(bunch.images[indices]).float().mul(255 / 16)[:, None]
        return resized(images, size).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(bunch.target[indices]).long()


class Torchvision:
    """One of torchvision's data sets, downloaded where there is a network; grey images get three channels."""

    def __init__(self, name: str, path: Path):
        self._splits = {"train": self._open(name, path, True), "val": self._open(name, path, False)}
        self.classes = list(self._splits["val"].classes)
        self.native_size = self._splits["val"].data.shape[1]

    def read(self, split: str, size: int) -> tuple[Tensor, Tensor]:
        images = torch.as_tensor(np.asarray(self._splits[split].data))
        images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.movedim(3, 1)
        return resized(images, size).contiguous(), torch.as_tensor(self._splits[split].targets).long()

    @staticmethod
    def _open(name: str, path: Path, train: bool) -> Any:
        from torchvision import datasets  # imports half of torch: no earlier than it is needed

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
