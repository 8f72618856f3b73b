"""Images: the known data sets and any class folders, as batches on the device.

Small images (CIFAR and the like) are read once, stay in memory as uint8 and are augmented a batch at a time.
ImageNet and its like stay on disk, and worker processes decode them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from engine import distributed
from engine.images.augment import Augmentation, normalise
from engine.images.datasets import DATASETS, PHOTOGRAPH_SIZE, SMALL
from engine.images.holdout import held_out
from engine.images.photographs import Batches, ImagesOnDisk, Photographs, spread
from engine.images.preprocessing import RandomPart, for_training, for_validation
from engine.images.sources import ClassFolders, Source, find_source
from engine.program import processes
from engine.program.errors import UserError
from engine.program.report import narrate, say
from model.registry import OF_CIFAR_NETWORKS, Preprocessing


@dataclass
class ImagesInMemory:
    """A data set as uint8 `[N, 3, H, W]` and labels `[N]` on the device; `train` is None for evaluation only.

    `test` are the images that nothing is chosen on, where a part of the training images is held out as `val`.
    """

    name: str
    classes: list[str]
    train: tuple[Tensor, Tensor] | None
    val: tuple[Tensor, Tensor]
    augmentation: Augmentation
    batch_size: int
    val_batch_size: int
    test: tuple[Tensor, Tensor] | None = None

    @property
    def for_test(self) -> "ImagesInMemory | None":
        """The same with the test images in place of the held-out ones."""
        return replace(self, train=None, val=self.test, test=None) if self.test else None

    @property
    def image_size(self) -> int:
        return self.val[0].shape[-1]

    @property
    def val_image_size(self) -> int:
        return self.image_size

    @property
    def num_train_batches(self) -> int:
        return max(1, self.num_train_images // self.batch_size)

    @property
    def num_val_batches(self) -> int:
        return -(-len(distributed.shard(self.val[1])) // self.val_batch_size)

    @property
    def num_train_images(self) -> int:
        return len(self.train[1]) if self.train else 0

    @property
    def num_val_images(self) -> int:
        return len(self.val[1])

    @cached_property
    def digest(self) -> str:
        """What distinguishes data sets of the same name: SHA-256 of all images and labels."""
        sha = hashlib.sha256()
        for tensor in (*(self.train or ()), *self.val, *(self.test or ())):
            sha.update(tensor.cpu().numpy())
        return sha.hexdigest()

    def train_batches(self, seed: int) -> Batches:
        """Every image once, shuffled and augmented by `seed` alone; an incomplete last batch is left out.

        Several processes share each batch; their order is the same, their augmentation draws are not.
        """
        assert self.train, "read for evaluation only"
        images, labels = self.train
        generator = torch.Generator(images.device).manual_seed(seed)
        order = torch.randperm(len(labels), device=images.device, generator=generator)
        if processes.rank():
            generator.manual_seed(seed + processes.rank())
        for batch in order.split(self.batch_size)[: self.num_train_batches]:
            indices = distributed.shard(batch)
            yield self.augmentation(images[indices], generator), labels[indices]

    def spread(self, number: int) -> "ImagesInMemory":
        """The same with so many of the validation images, evenly spread: their order is mostly that of the classes."""
        places = spread(number, self.num_val_images)
        return replace(self, val=(self.val[0][places], self.val[1][places]))

    def val_batches(self) -> Batches:
        """Every validation image once, in order, normalised; several processes share them."""
        val = zip(*(distributed.shard(tensor).split(self.val_batch_size) for tensor in self.val), strict=True)
        for images, labels in val:
            yield normalise(images, self.augmentation.statistics), labels


Data = ImagesInMemory | ImagesOnDisk


@dataclass(frozen=True)
class ImageRequest:
    """Which images are wanted, and how.

    Attributes:
        name: of the data set, one of `DATASETS`.
        path: the folder that holds it.
        image_size: side in pixels; None takes 32 for the known sets of small images, their own for other small
            images, and 224 for photographs.
        val_image_size: side of validation images, where it differs (photographs only).
        batch_size: training images of a step, over all processes.
        val_batch_size: validation images of a batch of one process.
        workers: processes that decode photographs.
        preprocessing: how photographs are resized, and all images normalised.
        train: read the training images too; without them, classes may lack validation images.
        holdout: the share of each class's training images that validation is on; 0 for the validation images.
        split: the folder with the validation images, "val" or "test"; None for the first that is there.
        augment_as: one of `AUGMENTATIONS`: "published", or "followup" for that of the authors' follow-up, or that of
            another data set (small images only).
    """

    name: str
    path: str | Path
    image_size: int | None = None
    val_image_size: int | None = None
    batch_size: int = 256
    val_batch_size: int = 512
    workers: int = 4
    preprocessing: Preprocessing = OF_CIFAR_NETWORKS
    train: bool = True
    holdout: float = 0.0
    split: str | None = None
    augment_as: str = "published"


def load_data(request: ImageRequest, device: torch.device) -> Data:
    """Read the data set that is wanted; UserError where it is missing, empty or damaged."""
    if request.augment_as == "followup" and not DATASETS[request.name].followup:
        known = ", ".join(name for name, facts in DATASETS.items() if facts.followup)
        raise UserError(f"--augment-as followup: differs for {known} alone, not for {request.name}; leave it out")
    if request.train and request.batch_size % processes.world_size():
        raise UserError(
            f"--batch-size {request.batch_size} can't be shared evenly by {processes.world_size()} processes; "
            f"take a multiple"
        )
    with distributed.first_process_first():
        threads = max(request.workers, 1)
        source = find_source(request.name, Path(request.path), request.train, threads, request.split)
        if isinstance(source, ClassFolders) and _are_photographs(request.name, source):
            if request.augment_as != "published":
                raise UserError(f"--augment-as {request.augment_as}: small images only, not photographs; leave it out")
            data: Data = _on_disk(request, source, device)
        else:
            data = _in_memory(request, source, device)
        if request.holdout and request.train:
            data = _holding_out(data, request.holdout)
        if data.train and data.num_train_images < processes.world_size():
            raise UserError(
                f"{request.path}: {data.num_train_images} training images can't be shared by {processes.world_size()} "
                f"processes; start fewer"
            )
    where = request.name if DATASETS[request.name].source == "scikit-learn" else f"{request.name} in {request.path}"
    narrate(f"{where}: {describe(data)}")
    for caution in (*_cautions(data), *_cautions_of_sizes(request, source, data)):
        say(f"WARNING: {caution}")
    return data


def _holding_out(data: Data, share: float) -> Data:
    """The data set with a part of each class's training images in the place of the validation images."""
    assert data.train
    if isinstance(data, ImagesInMemory):
        images, labels = data.train
        held = held_out(labels.cpu(), share, data.classes).to(labels.device)
        return replace(data, train=(images[~held], labels[~held]), val=(images[held], labels[held]), test=data.val)
    files = data.train.files
    held = held_out(torch.tensor([label for _, label in files]), share, data.classes)
    kept, chosen = ([files[i] for i in part.nonzero().flatten().tolist()] for part in (~held, held))
    return replace(data, train=replace(data.train, files=kept), val=replace(data.val, files=chosen), test=data.val)


def _are_photographs(name: str, source: ClassFolders) -> bool:
    photographs = DATASETS[name].photographs
    return photographs == "always" or (photographs == "by size" and source.native_size > SMALL)


def _on_disk(request: ImageRequest, source: ClassFolders, device: torch.device) -> ImagesOnDisk:
    preprocessing, found = request.preprocessing, source.survey
    size = request.image_size or DATASETS[request.name].native_size or PHOTOGRAPH_SIZE
    val_size = request.val_image_size or size
    return ImagesOnDisk(
        request.name,
        source.classes,
        Photographs(source.files["train"], for_training(size), found.white, RandomPart(size))
        if request.train
        else None,
        Photographs(source.files["val"], for_validation(preprocessing, val_size), found.white),
        size,
        val_size,
        request.batch_size,
        request.val_batch_size,
        request.workers,
        device,
        found.digest,
        preprocessing.photographs,
    )


def _in_memory(request: ImageRequest, source: Source, device: torch.device) -> ImagesInMemory:
    facts = DATASETS[request.name]
    size = request.image_size or facts.native_size or source.native_size
    named = {"published": request.name, "followup": facts.followup}
    augmented_as = DATASETS[named.get(request.augment_as) or request.augment_as]

    def on_device(split: str) -> tuple[Tensor, Tensor]:
        images, labels = source.read(split, size)
        return images.to(device), labels.to(device)

    return ImagesInMemory(
        request.name,
        source.classes,
        on_device("train") if request.train else None,
        on_device("val"),
        Augmentation(
            augmented_as.flip,
            int(size * augmented_as.padding),
            augmented_as.jitter,
            int(size * augmented_as.cutout),
            request.preprocessing.small_images,
        ),
        request.batch_size,
        request.val_batch_size,
    )


def describe(data: Data) -> str:
    """Say how many classes and images there are, and how large they are."""
    images = f"{data.num_val_images:,} {'held-out' if data.test else 'validation'} images of {data.val_image_size} px"
    if data.train:
        size = "" if data.image_size == data.val_image_size else f" of {data.image_size} px"
        images = f"{data.num_train_images:,} training images{size} and {images}"
    if data.for_test:
        images += f", and {data.for_test.num_val_images:,} test images"
    return f"{len(data.classes):,} classes, {images}"


def _cautions(data: Data) -> Iterator[str]:
    """What to expect of a data set with too little in it."""
    if len(data.classes) == 1:
        yield (
            "one class: whatever a network answers is right, so that its accuracy will be 100%; "
            "put the images of each class in a folder of its own"
        )
    if data.train and data.num_train_images < data.batch_size:
        yield (
            f"training images: {data.num_train_images:,}, fewer than --batch-size {data.batch_size:,}; "
            f"each epoch will be a single step"
        )
    if data.num_val_images == 1:
        yield "one validation image: the accuracy will be 0% or 100%, and says nothing of other images"


def _cautions_of_sizes(request: ImageRequest, source: Source, data: Data) -> Iterator[str]:
    """What to expect where the first image's size decides, and most are of another."""
    if DATASETS[request.name].photographs != "by size" or not isinstance(source, ClassFolders):
        return
    first, most = source.native_size, source.median_size
    sizes = f"the first image, {source.first_image}, is of {first:,} px, and most are of {most:,} px or"
    if isinstance(data, ImagesInMemory) and most >= 2 * first and (most > SMALL or not request.image_size):
        photographs = ", pass --dataset ImageNet if they are photographs" if most > SMALL else ""
        yield (
            f"{sizes} more: the first decides, and all will be squeezed into squares of {data.image_size:,} px; "
            f"remove it{photographs}, or pass --image-size"
        )
    if isinstance(data, ImagesOnDisk) and first >= 2 * most and most <= SMALL:
        yield (
            f"{sizes} less: the first decides, and all will be treated as photographs, cropped and enlarged to "
            f"{data.image_size:,} px; remove it, or pass --dataset CIFAR10, which takes any folder as small images"
        )
