#!/usr/bin/env python3
"""Trained images a second on a CPU where glibc unmaps large tensors that are freed, and where it keeps their memory.

    python benchmarks/kept_memory.py [--rounds 2]

Processes alternate, without and with the variables of docs/devices.md in their environment. Each trains KAIST AI's v1
(examples/kaist_micronet.py, random weights and images) at 4 bits with v2 as its teacher, batches of 128; its figures
are those of its last two epochs of six steps.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.device import Machine
from engine.images.augment import Augmentation
from engine.images.batches import ImagesInMemory
from engine.objective import Objective
from engine.program.report import table
from engine.training import Epoch, train_epoch
from examples.kaist_micronet import v1, v2
from model_quantization import EC2T

KEPT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(10**12),
    "MALLOC_TOP_PAD_": str(2**26),
}
BATCH, STEPS, EPOCHS = 128, 6, 3
CHILD = "--child"


def train() -> None:
    """Print images a second, the kernel's share of the CPU's time, and the peak in MiB."""
    machine = Machine(torch.device("cpu"))
    network, teacher = machine.place(v1()), machine.place(v2()).eval()
    optimizer = EC2T(network, s=0.3, g=0.0, bits=4).optimizer(lr=1e-4)
    count = BATCH * STEPS
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(100, (count,))
    augmentation = Augmentation(True, 4, (0.3, 0.3, 0.3, 0.075), 8)
    data = ImagesInMemory("folder", [], images, images, augmentation, BATCH, BATCH)
    for epoch in range(EPOCHS):
        if epoch == 1:
            began, before = time.perf_counter(), os.times()
        train_epoch(network, optimizer, data, machine, Epoch(epoch, ""), Objective(teacher, freeze_batch_norm=True))
    speed, after = (EPOCHS - 1) * count / (time.perf_counter() - began), os.times()
    system, user = after.system - before.system, after.user - before.user
    print(speed, system / (system + user), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    plain = {name: value for name, value in os.environ.items() if name not in KEPT}
    figures: dict[str, list[list[float]]] = {"unmapped": [], "kept": []}
    for _ in range(rounds):
        for name, environment in (("unmapped", plain), ("kept", plain | KEPT)):
            command = [sys.executable, __file__, CHILD]
            said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            figures[name].append([float(number) for number in said.split()])
    rows = []
    for name, runs in figures.items():
        speed, kernel, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        rows.append([name, f"{speed:.0f}", f"{kernel:.0%}", f"{peak:,.0f}"])
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    print(table(["memory", "images/s", "kernel", "peak MiB"], rows))


if __name__ == "__main__":
    train() if sys.argv[1:] == [CHILD] else main()
