"""Class folders: which files they hold, and their images as arrays."""

import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from engine.images.arrays import as_tensors, cached
from engine.images.decoding import decode_all, open_image
from engine.program.errors import UserError
from engine.program.report import say


class ClassFolders:
    """Image files, one folder a class (or as Tiny-ImageNet has them); `files[split]` pairs each with its label."""

    def __init__(self, train: Path, val: Path, with_train: bool, threads: int):
        self.folders, self.threads = {"train": train, "val": val}, threads
        self.classes = _class_names(val)
        self.files = {"val": _image_files(val, self.classes, every_class=with_train)}
        if with_train:
            self.files["train"] = _image_files(train, self.classes)
        if lacking := len(self.classes) - len({label for _, label in self.files["val"]}):
            say(f"{val}: {lacking:,} of {len(self.classes):,} classes have no images")

    @cached_property
    def native_size(self) -> int:
        """The larger side of the first image, in pixels."""
        return max(open_image(self.files["val"][0][0]).size)

    def read(self, split: str, size: int) -> tuple[Tensor, Tensor]:
        """Images become squares of `size` px; they are decoded the first time only."""
        files = self.files[split]
        arrays = cached(self.folders[split], size, files, self.classes, lambda: decode_all(files, size, self.threads))
        return as_tensors(*arrays)


def class_folders(path: Path, with_train: bool) -> tuple[Path, Path] | None:
    """The training and the validation folder under `path`, checked to hold the same classes; None if not there.

    Where there is only a validation folder, and only that is wanted, it stands for both.
    """
    train, val = path / "train", val_folder(path)
    if val is None or (with_train and not train.is_dir()):
        return None
    splits = (train, val) if train.is_dir() else (val, val)
    names = [_class_names(split) for split in splits]
    for split, classes in zip(splits, names, strict=True):
        if not classes:
            raise UserError(f"{split}: holds no class folders; put each class's images in a folder of its own")
    if different := sorted(set(names[0]) ^ set(names[1])):
        missing_in = val if different[0] in names[0] else train
        raise UserError(
            f"{train} and {val} hold different classes ({len(names[0])} and {len(names[1])}; "
            f"{different[0]} is missing in {missing_in}); make them the same"
        )
    return splits


def val_folder(path: Path) -> Path | None:
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
        return sorted((os.path.join(split, "images", name), label_of[label]) for name, label in annotations.items())
    files: list[tuple[str, int]] = []
    left_out: Counter[str] = Counter()
    for label, name in enumerate(classes):
        found = sorted(
            os.path.join(folder, file)
            for folder, _, names in os.walk(split / name)
            for file in names
            if not file.startswith(".")
        )
        images = [file for file in found if file.lower().endswith(IMG_EXTENSIONS)]
        files += [(file, label) for file in images]
        left_out.update(Path(file).suffix for file in set(found) - set(images))
    if left_out:
        kinds = ", ".join(sorted(suffix or "no extension" for suffix in left_out))
        say(f"{split}: {left_out.total():,} files are left out, they are not named as images ({kinds})")
    lacking = set(range(len(classes))) - {label for _, label in files}
    if lacking and (every_class or not files):
        raise UserError(f"{split / classes[min(lacking)]}: holds no images ({', '.join(IMG_EXTENSIONS)})")
    return files
