#!/usr/bin/env python3
"""What depthwise convolutions in 32 bit save in bfloat16 training on a CPU, side by side in one run.

    python benchmarks/depthwise.py [--rounds 5] [--no-layers]

Milliseconds of a forward and backward pass, the least of alternating rounds: under bfloat16 autocast alone, under
`Machine.autocast`, which computes the slow ones in 32 bit (`engine.depthwise`), and in 32 bit altogether.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.device import Machine
from engine.program.report import table
from model import build

CPU = torch.device("cpu")
CONTEXTS = {
    "bf16 alone": lambda: torch.autocast("cpu", torch.bfloat16),
    "here": Machine(CPU, "bf16").autocast,
    "32 bit": Machine(CPU).autocast,
}
# name: channels in and out, px, and arguments of Conv2d; batches of 32
LAYERS = {
    "3x3": (96, 96, 32, {"kernel_size": 3}),
    "3x3, stride 2": (96, 96, 64, {"kernel_size": 3, "stride": 2}),
    "3x3, stride 2, small": (216, 216, 8, {"kernel_size": 3, "stride": 2}),
    "3x3, dilation 2": (96, 96, 32, {"kernel_size": 3, "dilation": 2}),
    "3x3, two outputs a channel": (96, 192, 32, {"kernel_size": 3}),
    "5x5": (144, 144, 32, {"kernel_size": 5}),
    "5x5, stride 2": (144, 144, 32, {"kernel_size": 5, "stride": 2}),
    "7x7": (96, 96, 32, {"kernel_size": 7}),
}
# name: spec, batch, px
NETWORKS: dict[str, tuple[dict, int, int]] = {
    "MicroNet (1, 1)": ({"name": "cifar_micronet", "depth": 1.0, "width": 1.0, "num_classes": 100}, 64, 32),
    "EfficientNet-Lite1": ({"name": "efficientnet-lite1", "num_classes": 1000}, 8, 128),
    "EfficientNet-B1": ({"name": "efficientnet-b1", "num_classes": 1000}, 8, 128),
}


def milliseconds(module: nn.Module, images: torch.Tensor, rounds: int) -> list[float]:
    """The least time of a pass in each of CONTEXTS, which take turns."""
    least = dict.fromkeys(CONTEXTS, float("inf"))
    for _ in range(rounds + 1):
        for name, context in CONTEXTS.items():
            start = time.perf_counter()
            with context():
                output = module(images)
            output.float().sum().backward()
            least[name] = min(least[name], 1000 * (time.perf_counter() - start))
    return list(least.values())


def row(name: str, module: nn.Module, images: torch.Tensor, rounds: int) -> list[str]:
    layout = torch.channels_last
    alone, here, full = milliseconds(module.to(memory_format=layout), images.to(memory_format=layout), rounds)
    return [name, f"{alone:.1f}", f"{here:.1f}", f"{full:.1f}", f"{alone / here:.1f}x", f"{full / here:.1f}x"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-layers", action="store_true", help="networks alone")
    args = parser.parse_args()
    rows = []
    for name, (inputs, outputs, px, arguments) in () if args.no_layers else LAYERS.items():
        layer = nn.Conv2d(inputs, outputs, groups=inputs, padding=arguments["kernel_size"] // 2, **arguments)
        rows.append(row(name, layer, torch.randn(32, inputs, px, px, requires_grad=True), args.rounds))
    for name, (spec, batch, px) in NETWORKS.items():
        rows.append(row(name, build(spec).train(), torch.randn(batch, 3, px, px), args.rounds))
    print(table(["forward and backward, ms", *CONTEXTS, "against bf16", "against 32 bit"], rows))


if __name__ == "__main__":
    main()
