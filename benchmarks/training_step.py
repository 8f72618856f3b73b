#!/usr/bin/env python3
"""Trained images a second: this project's loop against a plain one in the style of 2019, side by side in one run.

    python benchmarks/training_step.py [--networks resnet20 micronet ...] [--loops device amp graphs compile]
                                       [--batch-size 128] [--steps 8] [--rounds 3]

Random images of 32 px with CIFAR-100's augmentation; SGD with Nesterov momentum; on the CPU, or on a GPU where there
is one. Each figure is the median over alternating rounds of `--steps` steps, after one round of warm-up.

    plain       torchvision's transforms image by image in 4 workers, 32 bit, NCHW, loss read back every step
    device      data and augmentation in batches on the device, channels-last layout (on CPUs), fused optimizer,
                nothing read back
    amp         the same in `--amp auto` or as --amp says, channels-last layout on GPUs too
    graphs      the same with `--cuda-graphs`, on GPUs alone
    compile     as amp, with `--compile`

Beside them the share of the device's peak that the fastest one reaches: of the matrix rate (a large product in the
same arithmetic) and of the memory bandwidth (a large copy), both measured in this run. A step's arithmetic is what
torch counts; its traffic is estimated as what every layer reads and writes, once forward and twice backward, as if
no cache helped and nothing was fused.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.plain import plain_loader, plain_step
from engine.device import Machine, fastest_arithmetic
from engine.images.augment import Augmentation
from engine.images.batches import ImagesInMemory
from engine.objective import Objective
from engine.program.report import table
from engine.training import Epoch, train_epoch
from model import build

CLASSES = 100
LOOPS = ("device", "amp", "graphs", "compile")
NETWORKS = {
    "resnet20": {"name": "resnet20"},
    "micronet": {"name": "cifar_micronet", "depth": 1.4**3.5, "width": 1.2**3.5},
    "efficientnet-lite1": {"name": "efficientnet-lite1"},
}
DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Run = Callable[[], object]


def sgd(network: nn.Module, fused: bool) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=fused)


def plain_epoch(spec: dict, images: torch.Tensor, labels: torch.Tensor, batch_size: int, device: torch.device) -> Run:
    network = build(spec).to(device).train()
    optimizer, loader = sgd(network, fused=False), plain_loader(images, labels, batch_size, rich=True)

    def epoch() -> None:
        for batch, batch_labels in loader:
            plain_step(network, optimizer, batch.to(device), batch_labels.to(device))

    return epoch


def our_epoch(spec: dict, images: torch.Tensor, labels: torch.Tensor, batch_size: int, machine: Machine) -> Run:
    network = machine.place(build(spec))
    optimizer, runner = sgd(network, fused=True), machine.runner(network)
    split = images.to(machine.device), labels.to(machine.device)
    augmentation = Augmentation(True, 4, (0.3, 0.3, 0.3, 0.075), 16)
    data = ImagesInMemory("folder", [], split, split, augmentation, batch_size, batch_size)
    return lambda: train_epoch(runner, optimizer, data, machine, Epoch(0, ""), Objective())


def seconds(function: Run, device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Matrix rate (FLOP/s) and memory bandwidth (byte/s) of the device: the best of ten tries each."""
    side, length = (8192, 2**30) if device.type == "cuda" else (1024, 2**27)
    matrix = torch.randn(side, side, device=device).to(dtype)
    source, target = (torch.ones(length, dtype=torch.uint8, device=device) for _ in range(2))
    rate = 2 * side**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(10))
    return rate, 2 * length / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


def work(spec: dict, element_size: int) -> tuple[float, float]:
    """FLOP and estimated bytes of memory traffic of training on one image."""
    network, batch, moved = build(spec), 2, 0

    def note(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal moved
        moved += sum(tensor.numel() for tensor in (*inputs, output)) * element_size

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(batch, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / batch, 3 * moved / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--loops", nargs="+", choices=LOOPS, help="what to compare with the plain loop (default: all)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--amp", choices=DTYPES, help="of the loops amp and compile (default: as auto)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    amp = args.amp or fastest_arithmetic(device)
    loops = args.loops or [loop for loop in LOOPS if loop != "graphs" or device.type == "cuda"]
    count = args.steps * args.batch_size
    images, labels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(CLASSES, (count,))
    rate, bandwidth = peaks(device, DTYPES[amp])

    rates, shares = [], []
    for name in args.networks:
        spec = {**NETWORKS[name], "num_classes": CLASSES}
        machines = {
            "device": Machine(device),
            "amp": Machine(device, amp),
            "graphs": Machine(device, amp, graphs=True),
            "compile": Machine(device, amp, compile=True),
        }
        epochs = [plain_epoch(spec, images, labels, args.batch_size, device)]
        epochs += [our_epoch(spec, images, labels, args.batch_size, machines[loop]) for loop in loops]
        times = [[seconds(epoch, device) for epoch in epochs] for _ in range(args.rounds + 1)][1:]
        speeds = [count / statistics.median(column) for column in zip(*times, strict=True)]
        rates.append([name, *(f"{speed:,.0f} ({speed / speeds[0]:.1f}x)" for speed in speeds)])
        flop, moved = work(spec, DTYPES[amp].itemsize)
        parts = max(speeds) * flop / rate, max(speeds) * moved / bandwidth
        shares.append([name, *(f"{part:.0%}" for part in parts), ("arithmetic", "memory")[parts[1] > parts[0]]])
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}, mixed precision is {amp}; batches of {args.batch_size}")
    print(table(["trained images a second", "plain", *loops], rates))
    print(f"\nMeasured peaks: {rate / 1e12:.2f} TFLOP/s, {bandwidth / 1e9:.0f} GB/s")
    print(table(["share of the peak", "matrix rate", "bandwidth", "nearer bound"], shares))


if __name__ == "__main__":
    main()
