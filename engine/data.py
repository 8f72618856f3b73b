"""Images: the known data sets and any class folders, as batches on the device.

Small images (CIFAR and the like) are read once, stay in memory as uint8 and are augmented a batch at a time.
ImageNet and its like stay on disk, and worker processes decode them.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from engine import UserError
from engine.augment import Augmentation, normalise

Batches = Iterator[tuple[Tensor, Tensor]]

SMALL = 64  # px; class folders of larger images are treated as ImageNet is
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NATIVE_SIZE = {"CIFAR100": 32, "CIFAR10": 32, "MNIST": 32, "FashionMNIST": 32, "digits": 32}


@dataclass
class ImagesInMemory:
    """A data set as uint8 `[N, 3, H, W]` and labels `[N]` on the device, for training and for validation."""

    name: str
    classes: list[str]
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    augmentation: Augmentation
    batch_size: int
    val_batch_size: int

    @property
    def image_size(self) -> int:
        return self.train[0].shape[-1]

    @property
    def num_train_batches(self) -> int:
        return max(1, len(self.train[1]) // self.batch_size)

    @property
    def num_val_batches(self) -> int:
        return -(-len(self.val[1]) // self.val_batch_size)

    @property
    def num_val_images(self) -> int:
        return len(self.val[1])

    def train_batches(self, seed: int) -> Batches:
        """Every image once, shuffled and augmented by `seed` alone; an incomplete last batch is left out."""
        images, labels = self.train
        generator = torch.Generator(images.device).manual_seed(seed)
        order = torch.randperm(len(labels), device=images.device, generator=generator)
        for indices in order.split(self.batch_size)[: self.num_train_batches]:
            yield self.augmentation(images[indices], generator), labels[indices]

    def val_batches(self) -> Batches:
        """Every validation image once, in order, normalised."""
        for images, labels in zip(self.val[0].split(self.val_batch_size), self.val[1].split(self.val_batch_size)):
            yield normalise(images), labels


@dataclass
class ImagesOnDisk:
    """A data set as class folders, decoded by worker processes."""

    name: str
    classes: list[str]
    train: datasets.VisionDataset
    val: datasets.VisionDataset
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
        return -(-len(self.val) // self.val_batch_size)

    @property
    def num_val_images(self) -> int:
        return len(self.val)

    def train_batches(self, seed: int) -> Batches:
        """Every image once, shuffled and augmented by `seed` alone; an incomplete last batch is left out."""
        whole = len(self.train) >= self.batch_size
        loader = self._loader(self.train, self.batch_size, shuffle=True, drop_last=whole, seed=seed)
        return self._on_device(loader)

    def val_batches(self) -> Batches:
        """Every validation image once, in order, normalised."""
        return self._on_device(self._loader(self.val, self.val_batch_size))

    def _loader(self, images, batch_size: int, seed: int = 0, **options) -> DataLoader:
        return DataLoader(
            images,
            batch_size,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(seed),
            worker_init_fn=_seed_worker,
            **options,
        )

    def _on_device(self, loader: DataLoader) -> Batches:
        try:
            for images, labels in loader:
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        except UserError as error:  # of a worker process: its last line is the message, the rest a traceback
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("engine.UserError: ")) from None


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
    bicubic: bool = False,
) -> Data:
    """Read the data set `name` from `path`; UserError where it is missing, empty or damaged.

    Args:
        image_size: side in pixels; None takes 32 for small images and 224 for photographs.
        val_image_size: side of validation images, where it differs (photographs only).
        bicubic: resize validation photographs bicubically, as EfficientNet's published accuracy assumes.
    """
    path = Path(path)
    folders = None if name == "digits" else _class_folders(path)
    if folders is None and name in ("ImageNet", "folder"):
        raise UserError(
            f"{path}: no class folders for --dataset {name} (looked for train/ and val/ or test/ with one "
            f"folder a class); pass the folder that holds them as --data-path"
        )
    if folders and (name == "ImageNet" or name == "folder" and _first_image_size(folders[0]) > SMALL):
        return _photographs(
            name, folders, device, image_size or 224, val_image_size, batch_size, val_batch_size, workers, bicubic
        )
    if folders:
        classes, train, val = _read_class_folders(folders, image_size or NATIVE_SIZE.get(name), max(workers, 1))
    elif name == "digits":
        classes, train, val = _digits(image_size or NATIVE_SIZE[name])
    else:
        classes, train, val = _torchvision(name, path, image_size or NATIVE_SIZE[name])
    size = train[0].shape[-1]
    return ImagesInMemory(
        name,
        classes,
        (train[0].to(device), train[1].to(device)),
        (val[0].to(device), val[1].to(device)),
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


def _class_folders(path: Path) -> tuple[Path, Path] | None:
    """The training and the validation folder under `path`, checked to hold the same classes; None if not there."""
    train, val = path / "train", next((p for p in (path / "val", path / "test") if p.is_dir()), None)
    if not train.is_dir() or val is None:
        return None
    names = [{p.name for p in split.iterdir() if p.is_dir()} for split in (train, val)]
    if not names[0]:
        raise UserError(f"{train}: holds no class folders; put each class's images in a folder of its own")
    if different := sorted(names[0] ^ names[1]):
        missing_in = val if different[0] in names[0] else train
        raise UserError(
            f"{train} and {val} hold different classes ({len(names[0])} and {len(names[1])}; "
            f"{different[0]} is missing in {missing_in}); make them the same"
        )
    return train, val


def _image_files(split: Path) -> list[tuple[Path, int]]:
    """Every image file of the class folders under `split`, with its label."""
    files = []
    for label, folder in enumerate(sorted(p for p in split.iterdir() if p.is_dir())):
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in datasets.folder.IMG_EXTENSIONS)
        if not found:
            raise UserError(f"{folder}: holds no images ({', '.join(datasets.folder.IMG_EXTENSIONS)})")
        files += [(file, label) for file in found]
    return files


def _first_image_size(split: Path) -> int:
    return max(_open(_image_files(split)[0][0]).size)


def _open(path: str | Path) -> Image.Image:
    """Decode an image file as RGB; UserError with its path where that fails."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: does not decode as an image ({error}); mend or remove it") from None


def _read_class_folders(folders: tuple[Path, Path], size: int | None, threads: int):
    """Decode all images of small-image class folders to `size` px (None: the first image's) squares."""
    classes = sorted(p.name for p in folders[0].iterdir() if p.is_dir())
    size = size or _first_image_size(folders[0])

    def decode(file: tuple[Path, int]) -> np.ndarray:
        image = _open(file[0])
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image)

    splits = []
    for split in folders:
        files = _image_files(split)
        with ThreadPoolExecutor(threads) as pool:
            images = np.stack(list(pool.map(decode, files, chunksize=64)))
        splits.append((torch.from_numpy(images).movedim(3, 1).contiguous(), torch.tensor([f[1] for f in files])))
    return classes, *splits


def _digits(size: int):
    """Scikit-learn's 1,797 handwritten digits of 8 px, enlarged; every fifth of a fixed shuffle is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().mul(255 / 16)[:, None]
    images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False)
    images = images.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(bunch.target).long()
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return [str(digit) for digit in range(10)], (images[train], labels[train]), (images[val], labels[val])


def _torchvision(name: str, path: Path, size: int):
    """Read one of torchvision's data sets, downloading it where there is a network."""
    splits = []
    for train in (True, False):
        try:
            dataset = getattr(datasets, name)(path, train=train, download=True)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{path}: {name} is not there and can't be downloaded ({reason[:100]}); pass --data-path with the set "
                f"or with train/ and test/ class folders"
            ) from None
        images = torch.as_tensor(np.asarray(dataset.data))
        images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.movedim(3, 1)
        if images.shape[-1] != size:
            images = F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False)
            images = images.round().clamp(0, 255).to(torch.uint8)
        splits.append((images.contiguous(), torch.as_tensor(dataset.targets).long()))
    return list(dataset.classes), *splits


def _photographs(name, folders, device, size, val_size, batch_size, val_batch_size, workers, bicubic) -> ImagesOnDisk:
    """ImageNet's augmentation for training; for validation, resize the shorter side by 8/7 and crop the centre."""
    val_size = val_size or size
    to_normal = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    augment = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *to_normal],
    )
    if bicubic:
        resize = transforms.Resize(val_size, transforms.InterpolationMode.BICUBIC)
    else:
        resize = transforms.Resize(val_size * 8 // 7)
    centre = transforms.Compose([resize, transforms.CenterCrop(val_size), *to_normal])
    for split in folders:
        _image_files(split)
    train, val = (
        datasets.ImageFolder(split, transform=transform, loader=_open)
        for split, transform in zip(folders, (augment, centre))
    )
    return ImagesOnDisk(name, train.classes, train, val, size, batch_size, val_batch_size, workers, device)


def _seed_worker(worker: int) -> None:
    random.seed(torch.initial_seed())
