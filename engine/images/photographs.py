"""Photographs, which stay on disk: worker processes decode them, and batches are normalised on the device."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from engine import distributed
from engine.images.augment import normalise
from engine.images.decoding import BadImages, Part, White, open_image
from engine.images.preprocessing import Transform
from engine.program.interruptions import signals_held
from model.registry import Statistics

Batches = Iterator[tuple[Tensor, Tensor]]

warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more workers than cores, as requested


@dataclass(frozen=True)
class Photographs(Dataset[tuple[Tensor, int] | BadImages]):
    """Image files and their labels; `transform` makes a tensor `[H, W, 3]`, uint8, of each, or of a `part` of it.

    Its random draws follow from `seed` and the image's index: however many workers share the work, the same
    seed gives the same images.
    """

    files: list[tuple[str, int]]
    transform: Transform
    white: White
    part: Part | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | BadImages:
        """An image and its label, or what is wrong with its file: an error that is raised arrives as a traceback."""
        file, label = self.files[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed + index)
            try:
                image = open_image(file, self.white, self.part)
            except BadImages as error:
                return error
            return self.transform(image), label


def spread(number: int, of: int) -> list[int]:
    """`number` places, or all if there are fewer, evenly spread over so many."""
    number = min(number, of)
    return [(2 * i + 1) * of // (2 * number) for i in range(number)]


def _collate(items: list[tuple[Tensor, int] | BadImages]) -> list[Tensor] | BadImages:
    """Items as a batch, or all that is wrong with them."""
    faults = [fault for item in items if isinstance(item, BadImages) for fault in item.faults]
    return BadImages(faults) if faults else default_collate(items)


@dataclass
class ImagesOnDisk:
    """A data set as class folders, decoded by worker processes; `train` is None for evaluation only."""

    name: str
    classes: list[str]
    train: Photographs | None
    val: Photographs
    image_size: int
    val_image_size: int
    batch_size: int
    val_batch_size: int
    workers: int
    device: torch.device
    digest: str
    """What distinguishes data sets of the same name: SHA-256 of all files' names and contents."""
    statistics: Statistics
    """What images are normalised by."""
    test: Photographs | None = None

    @property
    def for_test(self) -> "ImagesOnDisk | None":
        """The same with the test images in place of the held-out ones."""
        return replace(self, train=None, val=self.test, test=None) if self.test else None

    @property
    def num_train_batches(self) -> int:
        return max(1, self.num_train_images // self.batch_size)

    @property
    def num_val_batches(self) -> int:
        return -(-len(distributed.shard(range(len(self.val)))) // self.val_batch_size)

    @property
    def num_train_images(self) -> int:
        return len(self.train) if self.train else 0

    @property
    def num_val_images(self) -> int:
        return len(self.val)

    def train_batches(self, seed: int) -> Batches:
        """Every image once, shuffled and augmented by `seed` alone; an incomplete last batch is left out.

        Several processes share each batch.
        """
        assert self.train, "read for evaluation only"
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
        starts = range(0, self.num_train_batches * self.batch_size, self.batch_size)
        batches = [distributed.shard(order[start : start + self.batch_size]) for start in starts]
        return self._on_device(self._loader(replace(self.train, seed=seed), batches))

    def spread(self, number: int) -> "ImagesOnDisk":
        """The same with so many of the validation images, evenly spread: their order is that of the classes."""
        files = [self.val.files[place] for place in spread(number, self.num_val_images)]
        return replace(self, val=replace(self.val, files=files))

    def val_batches(self) -> Batches:
        """Every validation image once, in order, normalised; several processes share them."""
        order = distributed.shard(range(len(self.val)))
        starts = range(0, len(order), self.val_batch_size)
        return self._on_device(self._loader(self.val, [list(order[i : i + self.val_batch_size]) for i in starts]))

    def _loader(self, images: Photographs, batches: list[list[int]]) -> DataLoader[Any]:
        """A loader of the images whose indices are in `batches`."""
        return DataLoader(
            images,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # of the workers' seeds, which nothing uses: the global stream stays alone
        )

    def _on_device(self, loader: DataLoader[Any]) -> Batches:
        with signals_held():
            batches = iter(loader)
        for batch in batches:
            if isinstance(batch, BadImages):
                del batches  # else the error's traceback holds them, and the workers end only seconds later
                raise batch
            images, labels = batch
            images, labels = (each.to(self.device, non_blocking=True) for each in (images, labels))
            yield normalise(images.movedim(3, 1), self.statistics), labels
