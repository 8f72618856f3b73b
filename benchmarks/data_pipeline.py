#!/usr/bin/env python3
"""Augmented images a second: batches on the device against torchvision's transforms, one image at a time.

    python benchmarks/data_pipeline.py [--images 10000] [--batch-size 128] [--rounds 3]
    python benchmarks/data_pipeline.py --photographs DIR [--image-size 224]

Random images of 32 px, with flip and crop (CIFAR-10) and with ColorJitter and Cutout as well (CIFAR-100); on the
CPU, and on a GPU where there is one. Each figure is the median over alternating rounds of one epoch each. The plain
pipeline has 4 worker processes; its epoch includes starting them, as every epoch's does. With --photographs, a folder
with train/ and val/ class folders, instead: those, against torchvision's ImageFolder with as many workers.
"""

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.plain import plain_loader
from engine.images.augment import Augmentation
from engine.images.batches import ImageRequest, ImagesInMemory, load_data
from engine.program.report import table
from model.registry import OF_CIFAR_NETWORKS

AUGMENTATIONS = {
    "flip, crop": Augmentation(True, 4),
    "flip, crop, ColorJitter, Cutout": Augmentation(True, 4, (0.3, 0.3, 0.3, 0.075), 16),
}


def seconds(batches: Iterable, device: torch.device) -> float:
    """Time to have every batch on the device."""
    start = time.perf_counter()
    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def photographs(folder: str, size: int, batch_size: int, rounds: int) -> None:
    """Print the images a second of an epoch of training images, and what one costs the worker processes."""
    workers = len(os.sched_getaffinity(0))
    request = ImageRequest("ImageNet", folder, size, batch_size=batch_size, workers=workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = load_data(request, device)
    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(*OF_CIFAR_NETWORKS.photographs)]
    plain = DataLoader(
        ImageFolder(f"{folder}/train", transforms.Compose(steps)),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    used = ours.num_train_batches * batch_size
    measured = []
    for i in range(rounds):
        before = _seconds_of_children()
        wall, between = seconds(ours.train_batches(i), device), _seconds_of_children()
        measured.append((wall, seconds(plain, device), between - before, _seconds_of_children() - between))
    wall, plain_wall, own, plain_own = map(statistics.median, zip(*measured, strict=True))
    rows = [
        ["images a second", f"{used / plain_wall:,.0f}", f"{used / wall:,.0f}", f"{plain_wall / wall:.2f}x"],
        ["workers' ms an image", f"{1e3 * plain_own / used:.2f}", f"{1e3 * own / used:.2f}", f"{plain_own / own:.2f}x"],
    ]
    print(table([f"{workers} workers", "ImageFolder", "ours", "ratio"], rows))


def _seconds_of_children() -> float:
    """CPU time of the worker processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photographs", metavar="DIR")
    parser.add_argument("--image-size", type=int, default=224, help="in pixels, of photographs")
    args = parser.parse_args()
    if args.photographs:
        photographs(args.photographs, args.image_size, args.batch_size, args.rounds)
        return
    images = torch.randint(256, (args.images, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(100, (args.images,))
    used = args.images // args.batch_size * args.batch_size

    rows = []
    for device in map(torch.device, ["cpu"] + ["cuda"] * torch.cuda.is_available()):
        split = images.to(device), labels.to(device)
        for name, augmentation in AUGMENTATIONS.items():
            ours = ImagesInMemory("folder", [], split, split, augmentation, args.batch_size, args.batch_size)
            plain = plain_loader(images, labels, args.batch_size, rich=augmentation.jitter is not None)
            times = [(seconds(ours.train_batches(i), device), seconds(plain, device)) for i in range(args.rounds + 1)]
            columns = zip(*times[1:], strict=True)  # without the warm-up
            ours_rate, plain_rate = (used / statistics.median(column) for column in columns)
            rows.append(
                [f"{device.type}: {name}", f"{plain_rate:,.0f}", f"{ours_rate:,.0f}", f"{ours_rate / plain_rate:.1f}x"]
            )
    print(f"{torch.get_num_threads()} CPU threads; torch {torch.__version__}")
    print(table(["images a second", "one at a time", "batches", "ratio"], rows))


if __name__ == "__main__":
    main()
