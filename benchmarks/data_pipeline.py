#!/usr/bin/env python3
"""Augmented images a second: batches on the device against torchvision's transforms, one image at a time.

    python benchmarks/data_pipeline.py [--images 10000] [--batch-size 128] [--rounds 3]

Random images of 32 px, with flip and crop (CIFAR-10) and with ColorJitter and Cutout as well (CIFAR-100); on the
CPU, and on a GPU where there is one. Each figure is the median over alternating rounds of one epoch each. The plain
pipeline has 4 worker processes; its epoch includes starting them, as every epoch's does.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.plain import plain_loader
from engine.images.augment import Augmentation
from engine.images.batches import ImagesInMemory
from engine.program.report import table

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
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
