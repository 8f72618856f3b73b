"""Where images come from: class folders, `.npz` files, torchvision's data sets, scikit-learn's digits.

Each source knows its `classes` and its `native_size`, the side of its images (of the first, where they differ) in
pixels, and reads the split "train" or "val" as uint8 images `[N, 3, size, size]` and int64 labels `[N]`.
"""

from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from engine.images.arrays import ImageArrays, as_tensors, find_arrays, read_arrays, resized
from engine.images.datasets import DATA_PATH, DATASETS
from engine.images.folders import ClassFolders, class_folders, val_folder
from engine.program.errors import UserError


class Source(Protocol):
    classes: list[str]

    @property
    def native_size(self) -> int: ...

    def read(self, split: str, size: int) -> tuple[Tensor, Tensor]: ...


def find_source(name: str, path: Path, with_train: bool, threads: int) -> Source:
    """The data set `name` in `path`; UserError where it is missing, empty or damaged.

    Folders and `.npz` files in `path` go before what the name stands for.

    Args:
        with_train: the training split is wanted too; without it, classes may lack images.
        threads: how many decode small images of class folders.
    """
    facts = DATASETS[name]
    if facts.source == "scikit-learn":
        if path != Path(DATA_PATH):
            raise UserError(
                f"--data-path {path}: --dataset {name} comes with scikit-learn, not from a folder; "
                f"pass --dataset folder for the images there"
            )
        return Digits()
    if splits := class_folders(path, with_train):
        return ClassFolders(*splits, with_train, threads)
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
