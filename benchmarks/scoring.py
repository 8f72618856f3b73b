#!/usr/bin/env python3
"""How long counting takes on each ruler, and packing and unpacking, for every built-in model.

    python benchmarks/scoring.py [--models cifar_micronet efficientnet-b1 ...]

Networks have random ternary weights, 80% of them zeros. Seconds of wall time, the second of two rounds (the first one
imports what torch needs to trace a network).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.program.report import table, with_unit  # noqa: E402
from engine.store.checkpoint import Checkpoint  # noqa: E402
from model import build  # noqa: E402
from model.selection import ternary_candidates  # noqa: E402
from model_scoring.packing import read_packed, write_packed  # noqa: E402
from rulers import RULERS  # noqa: E402

SPECS = {
    "cifar_micronet": ({"name": "cifar_micronet", "depth": 1.4**3.5, "width": 1.2**3.5, "num_classes": 100}, 32),
    "imagenet_micronet": ({"name": "imagenet_micronet", "depth": 1.2, "width": 1.3, "num_classes": 1000}, 200),
    **{f"efficientnet-b{i}": ({"name": f"efficientnet-b{i}", "num_classes": 1000}, 256) for i in range(1, 5)},
    "resnet20": ({"name": "resnet20", "num_classes": 10}, 32),
}


def seconds(function: Callable) -> str:
    function()
    start = time.perf_counter()
    function()
    return f"{time.perf_counter() - start:.2f}"


def row(model: str, folder: Path) -> list[str]:
    """One row of the table."""
    torch.manual_seed(0)
    spec, size = SPECS[model]
    network = build(spec).eval()
    parameters = dict(network.named_parameters())
    for name in ternary_candidates(network, model):
        weight = parameters[name].data
        weight.copy_(0.03 * (torch.rand_like(weight) * 1.25).round() * weight.sign())
    checkpoint, path = Checkpoint(Path(model), spec, network.state_dict()), folder / f"{model}.safetensors"
    return [
        model,
        with_unit(sum(p.numel() for p in network.parameters())),
        *(seconds(lambda r=ruler: r.count(network, model, size, r.widths())) for ruler in RULERS.values()),
        seconds(lambda: write_packed(checkpoint, path)),
        seconds(lambda: read_packed(path)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SPECS, default=list(SPECS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(model, Path(folder)) for model in args.models]
    print(table(["seconds", "weights", *RULERS, "pack", "unpack"], rows))


if __name__ == "__main__":
    main()
