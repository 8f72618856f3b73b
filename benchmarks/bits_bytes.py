#!/usr/bin/env python3
"""Accuracy over bytes of a network whose weights are quantized to few bits, without a step of training.

    python benchmarks/bits_bytes.py --t-model FILE --data-path DIR [--dataset NAME] [--model MODULE:FUNCTION]

Each point from the pretrained network, with steps of least squared error: the layers that EC2T would take at b bits,
all other weights of two dimensions or more at 8, entropy constraint g. Writes a plot, --out, and beside it its points
as JSON: accuracy with the values that are packed, bytes of the packed file, scores on two rulers.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rulers
from engine.device import Machine
from engine.evaluation import as_stored, evaluate
from engine.images.batches import Data, ImageRequest, load_data
from engine.images.datasets import DATASETS
from engine.program.report import say
from engine.store.checkpoint import Checkpoint, read_network
from model import row_of
from model.own import is_own, run_once
from model.selection import ternary_candidates
from model_quantization.quantized_layers import AUTO, QuantizedLayers
from model_scoring.packing import write_packed
from rulers.tally import task_of

REST = 8  # bits of the other layers
SHOWN = 40  # points of accuracy below the network's own that the plot shows


def point(checkpoint: Checkpoint, data: Data, bits: int, g: float) -> dict:
    """Quantize, pack, count and evaluate."""
    network, name = checkpoint.network(), checkpoint.spec["name"]
    ran = run_once(network, data.val_image_size).layers if is_own(name) else ()
    candidates = set(ternary_candidates(network, name, ran))
    weights = [name for name, parameter in network.named_parameters() if parameter.ndim > 1]
    began = time.monotonic()
    layers = QuantizedLayers(network, {name: bits if name in candidates else REST for name in weights}, AUTO, g)
    seconds = time.monotonic() - began
    network.eval()
    with tempfile.TemporaryDirectory() as folder:
        packed = Checkpoint(checkpoint.path, checkpoint.spec, network.state_dict())
        report = write_packed(packed, Path(folder) / "packed.safetensors")
    tallies = rulers.count(network, data.val_image_size)
    machine = Machine(torch.device("cpu"))
    result = {
        "bits": bits,
        "g": g,
        "accuracy": evaluate(machine.place(as_stored(network)), data, machine).accuracy,
        "bytes": report.file_bytes,
        "float32_bytes": report.float32_bytes,
        "entropy": layers.entropy(),
        "scores": {name: tally.score(task_of(data.name)) for name, tally in tallies.items()},
        "seconds to quantize": seconds,
    }
    say(json.dumps(result))
    return result


def draw(points: list[dict], baseline: dict, title: str, path: Path) -> None:
    """One line for each width, from the largest file to the smallest; the network itself as a dotted line."""
    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    axes.axhline(baseline["accuracy"], color="#8a8a8a", ls=":", label=f"32 bit, {baseline['bytes'] / 1e6:.1f} MB")
    points = [p for p in points if p["accuracy"] > baseline["accuracy"] - SHOWN] or points
    widths = sorted({p["bits"] for p in points}, reverse=True)
    for bits, marker in zip(widths, "osD^v<>", strict=False):
        own = [p for p in points if p["bits"] == bits]
        accuracy = np.array([p["accuracy"] for p in own])
        errors = np.sqrt(accuracy * (100 - accuracy) / baseline["images"])
        place = [p["bytes"] / 1e6 for p in own]
        axes.errorbar(place, accuracy, errors, fmt=f"{marker}-", capsize=3, label=f"{bits} bit")
    least = min(p["accuracy"] for p in points)
    axes.set(xlabel="packed file (MB)", ylabel="accuracy (%)", title=title, ylim=(least - 2, baseline["accuracy"] + 2))
    axes.set(xlim=(0, 1.05 * max(p["bytes"] for p in points) / 1e6))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t-model", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="its builder, where it is one's own")
    parser.add_argument("--data-path", required=True, metavar="DIR")
    parser.add_argument("--dataset", choices=DATASETS, default="ImageNet")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4, 3, 2])
    parser.add_argument("--g", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.15])
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/bits_bytes.png"))
    args = parser.parse_args()
    checkpoint = read_network(args.t_model, {"name": args.model} if args.model else {})
    row = row_of(checkpoint.spec["name"])
    size = args.image_size or DATASETS[args.dataset].native_size
    size = size or (224 if is_own(checkpoint.spec["name"]) else row.image_size)
    request = ImageRequest(
        *(args.dataset, args.data_path),
        image_size=size,
        val_batch_size=50,
        workers=2,
        preprocessing=row.preprocessing,
        train=False,
    )
    machine = Machine(torch.device("cpu"))
    data = load_data(request, machine.device)
    checkpoint = checkpoint.run_at(size)
    checkpoint.check_classes(data.classes, data.name, args.data_path)
    dense = 4 * sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    accuracy = evaluate(machine.place(checkpoint.network()), data, machine).accuracy
    baseline = {"accuracy": accuracy, "bytes": dense, "images": data.num_val_images}
    say(json.dumps(baseline))
    points = [point(checkpoint, data, bits, g) for bits in args.bits for g in args.g]
    name = args.t_model.stem if is_own(checkpoint.spec["name"]) else checkpoint.spec["name"]
    draw(points, baseline, f"{name} on {data.num_val_images:,} validation images, no training", args.out)
    args.out.with_suffix(".json").write_text(json.dumps({"baseline": baseline, "points": points}, indent=2) + "\n")


if __name__ == "__main__":
    main()
