#!/usr/bin/env python3
"""Accuracy over zeros of a pretrained network that EC2T's assignment made sparse, without a step of training.

    python benchmarks/zeros_accuracy.py --t-model FILE --data-path DIR [--amp bf16] [--out FILE.png]

Two ways, each point from the pretrained network: pruning (`--do-prune`) at several s, and ternarization of the 1, 3,
6, 12 largest convolutions and of all of them, at several g. DIR holds val/ with one folder a class. Writes a plot and,
beside it, its points as JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.device import Machine
from engine.evaluation import evaluate
from engine.images.batches import Data, ImageRequest, load_data
from engine.program.report import say
from engine.store.checkpoint import Checkpoint, read_network
from model import row_of
from model.selection import pruning_candidates, ternary_candidates
from model_quantization.drawing import label_points
from model_quantization.quantized_layers import QuantizedLayers

PRUNING_S, PRUNING_G = (0.1, 0.2, 0.3, 0.4, 0.5), 0.15
TERNARY_S, TERNARY_G = 0.25, (0.0, 0.15)
LARGEST = (1, 3, 6, 12, None)  # None: all


def point(
    checkpoint: Checkpoint, data: Data, machine: Machine, s: float, g: float, number: int | None, prune: bool
) -> dict:
    """Zeros among all parameters and accuracy, both in percent, once the `number` largest candidates are treated."""
    network = checkpoint.network()
    weights = dict(network.named_parameters())
    candidates = (pruning_candidates if prune else ternary_candidates)(network, checkpoint.spec["name"])
    names = sorted(candidates, key=lambda name: -weights[name].numel())[:number]
    QuantizedLayers(network, names, s, g, prune=prune)
    zeros = sum((w == 0).sum().item() for w in weights.values()) / sum(w.numel() for w in weights.values())
    accuracy = evaluate(machine.place(network), data, machine).accuracy
    result = {"s": s, "g": g, "layers": len(names), "prune": prune, "zeros": 100 * zeros, "accuracy": accuracy}
    say(json.dumps(result))
    return result


def draw(curves: dict[str, list[dict]], baseline: float, images: int, title: str, path: Path) -> None:
    """One line a curve, with standard errors; each point's label is its number of layers, or s where it was pruned."""
    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    axes.axhline(baseline, color="#8a8a8a", ls=":", label=f"as published: {baseline:.2f}%")
    for (label, points), style in zip(curves.items(), ("o-", "s--", "^:"), strict=False):
        accuracy = np.array([p["accuracy"] for p in points])
        errors = np.sqrt(accuracy * (100 - accuracy) / images)
        axes.errorbar([p["zeros"] for p in points], accuracy, errors, fmt=style, ms=4, capsize=3, label=label)
    axes.set(xlabel="zeros (% of all parameters)", ylabel="accuracy (%)", title=title, ylim=(-3, 100))
    axes.legend(loc="center right")
    everything = [p for points in curves.values() for p in points]
    texts = [f"s {p['s']:g}" if p["prune"] else f"{p['layers']}" for p in everything]
    label_points(axes, [(p["zeros"], p["accuracy"]) for p in everything], texts)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t-model", type=Path, required=True, metavar="FILE", help="a full-precision EfficientNet")
    parser.add_argument("--data-path", required=True, metavar="DIR")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/zeros_accuracy.png"))
    args = parser.parse_args()
    checkpoint = read_network(args.t_model)
    model = checkpoint.spec["name"]
    machine = Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.amp)
    request = ImageRequest(
        "ImageNet",
        args.data_path,
        image_size=row_of(model).image_size,
        val_batch_size=args.batch_size,
        workers=0,
        preprocessing=row_of(model).preprocessing,
        train=False,
    )
    data = load_data(request, machine.device)
    checkpoint.check_classes(data.classes, data.name, args.data_path)
    baseline = evaluate(machine.place(checkpoint.network()), data, machine).accuracy
    say(f"{model}: {baseline:.2f}% of {data.num_val_images:,} images as published")
    curves = {
        f"classifier pruned, g {PRUNING_G:g}": [
            point(checkpoint, data, machine, s, PRUNING_G, None, prune=True) for s in PRUNING_S
        ]
    }
    for g in TERNARY_G:
        curves[f"n largest convolutions ternary, s {TERNARY_S:g}, g {g:g}"] = [
            point(checkpoint, data, machine, TERNARY_S, g, number, prune=False) for number in LARGEST
        ]
    number = data.num_val_images
    draw(curves, baseline, number, f"{model} on {number:,} validation images, no training", args.out)
    args.out.with_suffix(".json").write_text(json.dumps({"baseline": baseline, **curves}, indent=2) + "\n")


if __name__ == "__main__":
    main()
