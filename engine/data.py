"""Images: the known data sets and any class folders, as batches on the device.

Small images (CIFAR and the like) are read once, stay in memory as uint8 and are augmented a batch at a time.
ImageNet and its like stay on disk, and worker processes decode them.
"""

import hashlib
import os
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets

from engine import UserError, distributed
from engine.augment import Augmentation, normalise
from engine.packed_images import cached, packed_files, read_packed
from engine.preprocessing import IMAGENET, Preprocessing, Transform
from engine.report import say

Batches = Iterator[tuple[Tensor, Tensor]]

SMALL = 64  # px; class folders of larger images are treated as ImageNet is
NATIVE_SIZE = {"CIFAR100": 32, "CIFAR10": 32, "MNIST": 32, "FashionMNIST": 32, "digits": 32}

warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more workers than cores: as told


@dataclass
class ImagesInMemory:
    """A data set as uint8 `[N, 3, H, W]` and labels `[N]` on the device; `train` is None for evaluation only."""

    name: str
    classes: list[str]
    train: tuple[Tensor, Tensor] | None
    val: tuple[Tensor, Tensor]
    augmentation: Augmentation
    batch_size: int
    val_batch_size: int

    @property
    def image_size(self) -> int:
        return self.val[0].shape[-1]

    @property
    def num_train_batches(self) -> int:
        return max(1, len(self.train[1]) // self.batch_size)

    @property
    def num_val_batches(self) -> int:
        return -(-len(distributed.share(self.val[1])) // self.val_batch_size)

    @property
    def num_val_images(self) -> int:
        return len(self.val[1])

    @cached_property
    def digest(self) -> str:
        """Tells data sets apart that have the same name: SHA-256 of all images and labels."""
        sha = hashlib.sha256()
        for tensor in (*(self.train or ()), *self.val):
            sha.update(tensor.cpu().numpy())
        return sha.hexdigest()

    def train_batches(self, seed: int) -> Batches:
        """Every image once, shuffled and augmented by `seed` alone; an incomplete last batch is left out.

        Several processes share each batch; their order is the same, their augmentation draws are not.
        """
        images, labels = self.train
        generator = torch.Generator(images.device).manual_seed(seed)
        order = torch.randperm(len(labels), device=images.device, generator=generator)
        if distributed.rank():
            generator.manual_seed(seed + distributed.rank())
        for batch in order.split(self.batch_size)[: self.num_train_batches]:
            indices = distributed.share(batch)
            yield self.augmentation(images[indices], generator), labels[indices]

    def val_batches(self) -> Batches:
        """Every validation image once, in order, normalised; several processes share them."""
        val = zip(*(distributed.share(tensor).split(self.val_batch_size) for tensor in self.val))
        for images, labels in val:
            yield normalise(images), labels


@dataclass(frozen=True)
class Photographs(Dataset):
    """Image files and their labels; `transform` makes a tensor `[3, H, W]` of each.

    Its random draws follow from `seed` and the image's index: however many workers share the work, the same
    seed gives the same images.
    """

    files: list[tuple[str, int]]
    transform: Transform
    seed: int = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.files[index]
        image = _open(file)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed + index)
            return self.transform(image), label


@dataclass
class ImagesOnDisk:
    """A data set as class folders, decoded by worker processes; `train` is None for evaluation only."""

    name: str
    classes: list[str]
    train: Photographs | None
    val: Photographs
    image_size: int
    batch_size: int
    val_batch_size: int
    workers: int
    device: torch.device

    @property
    def num_train_batches(self) -> int:
        return max(1, len(self.train) // self.batch_size)

    @property
    def num_val_batches(self) -> int:
        return -(-len(distributed.share(range(len(self.val)))) // self.val_batch_size)

    @property
    def num_val_images(self) -> int:
        return len(self.val)

    @cached_property
    def digest(self) -> str:
        """Tells data sets apart that have the same name: SHA-256 of all classes' and files' names."""
        files = [file for split in (self.train, self.val) if split for file, _ in split.files]
        root = os.path.commonpath(files)
        return hashlib.sha256("\n".join(os.path.relpath(file, root) for file in files).encode()).hexdigest()

    def train_batches(self, seed: int) -> Batches:
        """Every image once, shuffled and augmented by `seed` alone; an incomplete last batch is left out.

        Several processes share each batch.
        """
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
        starts = range(0, self.num_train_batches * self.batch_size, self.batch_size)
        batches = [distributed.share(order[start : start + self.batch_size]) for start in starts]
        return self._on_device(self._loader(replace(self.train, seed=seed), batches))

    def val_batches(self) -> Batches:
        """Every validation image once, in order, normalised; several processes share them."""
        order = distributed.share(range(len(self.val)))
        starts = range(0, len(order), self.val_batch_size)
        return self._on_device(self._loader(self.val, [order[i : i + self.val_batch_size] for i in starts]))

    def _loader(self, images: Photographs, batches: list) -> DataLoader:
        """A loader of the images whose indices are in `batches`."""
        return DataLoader(
            images,
            batch_sampler=batches,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # of the workers' seeds, which nothing uses: the global stream stays alone
        )

    def _on_device(self, loader: DataLoader) -> Batches:
        try:
            with _signals_held():
                batches = iter(loader)
            for images, labels in batches:
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        except UserError as error:  # of a worker process: its last line is the message, the rest a traceback
            message = str(error).strip().splitlines()[-1].removeprefix("engine.UserError: ")
            error.__traceback__ = None  # a cycle that holds the loader: collected later, its workers end after seconds
            del batches
            raise UserError(message) from None


Data = ImagesInMemory | ImagesOnDisk


def load_data(
    name: str,
    path: str | Path,
    device: torch.device,
    image_size: int | None = None,
    val_image_size: int | None = None,
    batch_size: int = 256,
    val_batch_size: int = 512,
    workers: int = 4,
    preprocessing: Preprocessing = IMAGENET,
    train: bool = True,
) -> Data:
    """Read the data set `name` from `path`; UserError where it is missing, empty or damaged.

    Args:
        image_size: side in pixels; None takes 32 for small images and 224 for photographs.
        val_image_size: side of validation images, where it differs (photographs only).
        preprocessing: how photographs are resized and normalised.
        train: read the training images too; without them, classes may lack validation images.
    """
    if batch_size % distributed.world_size():
        raise UserError(
            f"--batch-size {batch_size} can't be shared evenly by {distributed.world_size()} processes; take a multiple"
        )
    path = Path(path)
    folders = None if name == "digits" else _class_folders(path, with_train=train)
    packed = None if folders or name in ("digits", "ImageNet") else packed_files(path, with_train=train)
    if folders is packed is None and name in ("ImageNet", "folder"):
        looked_for = "train/ and val/ or test/" if train else "val/ or test/"
        raise UserError(
            f"{path}: {'no class folders' if path.is_dir() else 'no such folder'} for --dataset {name} (looked for "
            f"{looked_for} with one folder a class); pass the folder that holds them as --data-path"
        )
    size = image_size or NATIVE_SIZE.get(name)
    if folders:
        classes = _class_names(folders[1])
        val_files = _image_files(folders[1], every_class=train)
        train_files = _image_files(folders[0]) if train else val_files
        if lacking := len(classes) - len({label for _, label in val_files}):
            say(f"{folders[1]}: {lacking:,} of {len(classes):,} classes have no images")
        if name == "ImageNet" or name == "folder" and _first_image_size(val_files) > SMALL:
            size = size or 224
            train_set = Photographs(train_files, preprocessing.training(size)) if train else None
            val_set = Photographs(val_files, preprocessing.validation(val_image_size or size))
            return ImagesOnDisk(name, classes, train_set, val_set, size, batch_size, val_batch_size, workers, device)
        size = size or _first_image_size(val_files)
        train_split, val_split = (
            partial(_read_class_folders, split, files, size, max(workers, 1))
            for split, files in zip(folders, (train_files, val_files))
        )
    elif packed:
        contents = [read_packed(file) for file in packed]
        classes = contents[1].classes
        if contents[0].classes != classes:
            raise UserError(f"{packed[0]} and {packed[1]} hold different classes; pack them from the same set")
        size = size or contents[1].images.shape[1]
        train_split, val_split = (partial(_at_size, split.images, split.labels, size) for split in contents)
    elif name == "digits":
        classes = [str(digit) for digit in range(10)]
        train_split, val_split = (partial(_read_digits, size, held_out) for held_out in (False, True))
    else:
        train_set, val_set = (_torchvision(name, path, split) for split in (True, False))
        classes = list(val_set.classes)
        train_split, val_split = (partial(_read_torchvision, dataset, size) for dataset in (train_set, val_set))

    def on_device(split: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return split[0].to(device), split[1].to(device)

    return ImagesInMemory(
        name,
        classes,
        on_device(train_split()) if train else None,
        on_device(val_split()),
        _augmentation(name, size),
        batch_size,
        val_batch_size,
    )


def _augmentation(name: str, size: int) -> Augmentation:
    """The published augmentation of each data set; 4 px of padding and 16 px of Cutout are of 32 px images."""
    flip = name not in ("digits", "MNIST")  # a mirrored digit is not a digit
    if name == "CIFAR100":
        return Augmentation(flip, size // 8, (0.3, 0.3, 0.3, 0.075), size // 2)
    return Augmentation(flip, size // 8, None, 0)


def _class_folders(path: Path, with_train: bool) -> tuple[Path, Path] | None:
    """The training and the validation folder under `path`, checked to hold the same classes; None if not there.

    Where there is only a validation folder, and only that is wanted, it stands for both.
    """
    train, val = path / "train", next((p for p in (path / "val", path / "test") if p.is_dir()), None)
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


def _class_names(split: Path) -> list[str]:
    return sorted(p.name for p in split.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_files(split: Path, every_class: bool = True) -> list[tuple[str, int]]:
    """Every image file in or below the class folders under `split`, with its label; hidden files do not count.

    UserError where there is none, or, with `every_class`, where a class has none.
    """
    files, empty = [], []
    for label, name in enumerate(_class_names(split)):
        found = sorted(
            os.path.join(folder, file)
            for folder, _, names in os.walk(split / name)
            for file in names
            if file.lower().endswith(datasets.folder.IMG_EXTENSIONS) and not file.startswith(".")
        )
        files += [(file, label) for file in found]
        empty += [] if found else [split / name]
    if empty and (every_class or not files):
        raise UserError(f"{empty[0]}: holds no images ({', '.join(datasets.folder.IMG_EXTENSIONS)})")
    return files


def _first_image_size(files: list[tuple[str, int]]) -> int:
    return max(_open(files[0][0]).size)


def _open(path: str) -> Image.Image:
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


def _at_size(images: np.ndarray, labels: np.ndarray, size: int) -> tuple[Tensor, Tensor]:
    """uint8 images `[N, H, W, 3]` as `[N, 3, size, size]`."""
    tensor = torch.from_numpy(images).movedim(3, 1)
    if tensor.shape[-2:] != (size, size):
        tensor = _resized(tensor.float(), size)
    return tensor.contiguous(), torch.from_numpy(labels)


def _read_class_folders(
    split: Path, files: list[tuple[str, int]], size: int, threads: int
) -> tuple[Tensor, Tensor]:
    """All images of small-image class folders as squares of `size` px, decoded the first time only."""
    images, labels = cached(split, size, files, lambda: _decode_all(files, size, threads))
    return torch.from_numpy(images).movedim(3, 1).contiguous(), torch.from_numpy(labels)


def _decode_all(files: list[tuple[str, int]], size: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Image files as uint8 `[N, size, size, 3]`, and their labels."""

    def decode(file: tuple[str, int]) -> np.ndarray:
        image = _open(file[0])
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image)

    with ThreadPoolExecutor(threads) as pool:
        images = np.stack(list(pool.map(decode, files)))
    return images, np.array([label for _, label in files])


def _read_digits(size: int, held_out: bool) -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 handwritten digits of 8 px, enlarged; a fixed stratified fifth is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    split = train_test_split(np.arange(len(bunch.target)), test_size=0.2, stratify=bunch.target, random_state=0)
    indices = split[held_out]
    images = torch.from_numpy(bunch.images[indices]).float().mul(255 / 16)[:, None]
    return _resized(images, size).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(bunch.target[indices]).long()


def _torchvision(name: str, path: Path, train: bool) -> datasets.VisionDataset:
    """Open one of torchvision's data sets, downloading it where there is a network."""
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
            f"{path}: {name} can't be read there, nor downloaded ({reason[:100]}); pass the folder that holds the set, "
            f"or train/ and test/ class folders, as --data-path"
        ) from None


def _read_torchvision(dataset: datasets.VisionDataset, size: int) -> tuple[Tensor, Tensor]:
    """All images of a torchvision data set, grey ones with three channels, at `size` px."""
    images = torch.as_tensor(np.asarray(dataset.data))
    images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.movedim(3, 1)
    if images.shape[-1] != size:
        images = _resized(images.float(), size)
    return images.contiguous(), torch.as_tensor(dataset.targets).long()


def _resized(images: Tensor, size: int) -> Tensor:
    """Float images `[N, C, H, W]` of 0 to 255 as uint8 `[N, C, size, size]`, bicubic."""
    images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False)
    return images.round().clamp(0, 255).to(torch.uint8)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold Ctrl-C and the like back: this process hears of them afterwards, those started in here ignore Ctrl-C.

    An exception that a signal's handler raises in the middle of a fork would be lost.
    """
    held = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for arguments in held[:1]:
            handlers[arguments[0]](*arguments)
