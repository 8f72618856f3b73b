"""Class folders: which classes and image files they hold.

Files and folders that are hidden, or that systems make, do not count. Linked folders are followed, but no folder is
read twice for one class. Class names are compared, and kept, in Unicode's composed form.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.program.errors import UserError, printable
from engine.program.report import narrate

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision has them
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
ZIP_ENCODINGS = ("latin-1", "cp437")  # of names in archives that are not in UTF-8
LISTED = 3  # names in a line that says what is left out

Identity = tuple[int, int]  # of a folder: device and inode


def class_folders(path: Path, with_train: bool, split: str | None = None) -> tuple[Path, Path] | None:
    """The training and the validation folder under `path`, checked to hold the same classes; None if not there.

    Where there is only a validation folder, and only that is wanted, it stands for both. `split` is "val" or "test",
    the validation folder's name; None for the first that is there.
    """
    train, val = path / "train", val_folder(path, split)
    if val is None or (with_train and not train.is_dir()):
        return None
    splits = (train, val) if train.is_dir() else (val, val)
    names = [class_names(folder) for folder in splits]
    for folder, classes in zip(splits, names, strict=True):
        if not classes:
            raise UserError(f"{folder}: holds no class folders; put each class's images in a folder of its own")
    if different := sorted(set(names[0]) ^ set(names[1])):
        there, lacking = (train, val) if different[0] in names[0] else (val, train)
        if twin := _twin(different[0], set(different[1:]) - set(names[there is val])):
            raise UserError(
                f"{train} and {val} hold the same classes in different encodings ({printable(different[0])} in {there} "
                f"is {printable(twin)} in {lacking}); rename them"
            )
        raise UserError(
            f"{train} and {val} hold different classes ({len(names[0])} and {len(names[1])}; "
            f"{printable(different[0])} is missing in {lacking}); make them the same"
        )
    if (path / "val").is_dir() and (path / "test").is_dir():
        unused = "test" if val.name == "val" else "val"
        narrate(f"{path}: validation on {val.name}/, {unused}/ is not used (--split {unused} takes that)")
    return splits


def val_folder(path: Path, split: str | None = None) -> Path | None:
    """The folder with the validation images: `split`, or the first of val/ and test/ that is there."""
    folders = [path / name for name in ([split] if split else ["val", "test"])]
    return next((folder for folder in folders if folder.is_dir()), None)


def composed(name: str) -> str:
    """A name as other systems spell it too: they compose letters and accents, or take them apart."""
    return unicodedata.normalize("NFC", name)


def _twin(name: str, others: Iterable[str]) -> str | None:
    """That of the `others` which is `name` in another encoding."""

    def spellings(text: str) -> set[str]:
        try:
            text.encode()
        except UnicodeEncodeError:
            stored = text.encode(errors="surrogateescape")
            return {composed(stored.decode(encoding)) for encoding in ZIP_ENCODINGS}
        return {text}

    return next((other for other in sorted(others) if spellings(name) & spellings(other)), None)


# ------------------------------------------------------------------------------------- classes


def class_names(split: Path) -> list[str]:
    """The classes of a split, sorted."""
    return sorted({composed(name) for name in _annotations(split).values()} or _class_paths(split, _Found()))


def _class_paths(split: Path, found: "_Found") -> dict[str, str]:
    """The path of each class's folder, by the class's name; what is not one is added to `found`."""
    paths: dict[str, str] = {}
    above = _identities_above(split)
    with os.scandir(split) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if not os.path.isdir(entry.path):
            found.dead_links += [entry.path] if entry.is_symlink() and not os.path.exists(entry.path) else []
        elif is_hidden(entry.name):
            found.hidden_folders.append(entry.path)
        elif entry.is_symlink() and _identity(entry.path) in above:
            found.read_already.append(entry.path)
        elif (name := composed(entry.name)) in paths:
            raise UserError(
                f"{split}: holds the class {printable(name)} twice, under names that differ in their Unicode form only;"
                f" put its images in one folder"
            )
        else:
            paths[name] = entry.path
            found.linked += [entry.path] if entry.is_symlink() else []
    return paths


def _annotations(split: Path) -> dict[str, str]:
    """Class by file name, where `split` is laid out as Tiny-ImageNet's val/; else nothing.

    There, val_annotations.txt has a line for each file in images/: its name, its class and a box, between tabs.
    """
    listing = split / f"{split.name}_annotations.txt"
    if not listing.is_file():
        return {}
    text = listing.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [line.split("\t") for line in text.split("\n") if line]
    if any(len(line) < 2 for line in lines):
        raise UserError(f"{listing}: has a line that is not a file's name, a tab and its class; mend or remove it")
    return {name: label for name, label, *_ in lines}


# ------------------------------------------------------------------------------------- files


@dataclass
class _Found:
    """What lies in class folders: image files, and what is not read."""

    images: list[str] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)  # by their extension
    hidden_images: list[str] = field(default_factory=list)
    hidden_folders: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    read_already: list[str] = field(default_factory=list)
    dead_links: list[str] = field(default_factory=list)
    pipes: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Say what is left out, and what links lead to."""
        if self.other:
            kinds = ", ".join(sorted(suffix or "no extension" for suffix in self.other))
            yield f"{self.other.total():,} files are left out, they are not named as images ({kinds})"
        for what, names in (
            ("hidden folders left out", self.hidden_folders),
            ("hidden image files left out", self.hidden_images),
            ("linked folders followed", self.linked),
            ("links to folders that are read already, left out", self.read_already),
            ("links that lead nowhere, left out", self.dead_links),
            ("pipes, devices and the like left out", self.pipes),
        ):
            if names:
                some = ", ".join(sorted({os.path.basename(name) for name in names})[:LISTED])
                yield f"{what}: {len(names):,} ({some})"


def image_files(split: Path, classes: Sequence[str], every_class: bool = True) -> list[tuple[str, int]]:
    """Every image file in or below the class folders under `split`, with its label, an index into `classes`.

    UserError where there is none, or, with `every_class`, where a class has none. Lines say what is left out.
    """
    if annotations := _annotations(split):
        label_of = {name: label for label, name in enumerate(classes)}
        folder = split / "images"
        stored = os.listdir(folder) if folder.is_dir() else []
        there = {composed(name): name for name in stored} | {name: name for name in stored}
        return sorted(
            (os.path.join(folder, there.get(name) or there.get(composed(name), name)), label_of[composed(label)])
            for name, label in annotations.items()
        )
    files, found = [], _Found()
    paths, above = _class_paths(split, found), _identities_above(split)
    for label, name in enumerate(classes):
        before = len(found.images)
        _walk(paths[name], {*above, _identity(paths[name])}, found)
        files += [(file, label) for file in sorted(found.images[before:])]
    for line in found.lines():
        narrate(f"{split}: {line}")
    lacking = set(range(len(classes))) - {label for _, label in files}
    if lacking and (every_class or not files):
        raise UserError(f"{paths[classes[min(lacking)]]}: holds no images ({', '.join(SUFFIXES)})")
    return files


def _walk(folder: str, seen: set[Identity], found: _Found) -> None:
    """Add to `found` what is in or below `folder`, without the folders that were `seen` before."""
    unread = [folder]
    while unread:
        with os.scandir(unread.pop()) as entries:
            folders = [entry for entry in entries if not _add_file(entry, found)]
        for entry in sorted(folders, key=lambda entry: (entry.is_symlink(), entry.name)):  # the same on every machine
            if is_hidden(entry.name):
                found.hidden_folders.append(entry.path)
            elif (identity := _identity(entry.path)) in seen:
                found.read_already.append(entry.path)
            else:
                seen.add(identity)
                unread.append(entry.path)
                found.linked += [entry.path] if entry.is_symlink() else []


def _add_file(entry: os.DirEntry[str], found: _Found) -> bool:
    """Add what is no folder to `found`; whether it is none."""
    linked = entry.is_symlink()
    if entry.is_dir(follow_symlinks=False) or (linked and os.path.isdir(entry.path)):
        return False
    is_image = entry.name.lower().endswith(SUFFIXES)
    # a link to a file that is gone counts: it will be named
    is_file = entry.is_file(follow_symlinks=False) or (
        linked and (os.path.isfile(entry.path) or not os.path.exists(entry.path))
    )
    if is_hidden(entry.name):
        found.hidden_images += [entry.path] if is_image else []
    elif not is_file:
        found.pipes.append(entry.path)
    elif is_image:
        found.images.append(entry.path)
    else:
        found.other[os.path.splitext(entry.name)[1]] += 1
    return True


def is_hidden(name: str) -> bool:
    """Whether files and folders of this name are no part of a data set."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _identity(folder: str | Path) -> Identity:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _identities_above(split: Path) -> set[Identity]:
    """Of a split's folder and all that it lies in: a link to one of these would make one class of everything."""
    real = split.resolve()
    return {_identity(folder) for folder in (real, *real.parents)}
