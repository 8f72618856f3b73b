#!/usr/bin/env python3
"""README's picture, accuracy over bytes, from the results in front.json beside this file.

    python benchmarks/front.py

Each result is a file's bytes and what it holds; benchmarks/README.md has the command of each.
"""

import itertools
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model_quantization.drawing import label_points

HERE = Path(__file__).resolve().parent
STYLES = {
    "32 bit": ("#8a8a8a", "s"),
    "published": ("#2b4a73", "^"),
    "others, without training": ("#b8862b", "D"),
    "here, without training": ("#3f8f5f", "v"),
    "here, trained": ("#c2452d", "o"),
}


def size(number: float, _: object = None) -> str:
    """Bytes as people write them."""
    return f"{number / 1e6:g} MB" if number >= 1e6 else f"{number / 1e3:g} KB"


def main() -> None:
    panels = json.loads((HERE / "front.json").read_text())
    figure, grid = plt.subplots(2, 2, figsize=(11, 8.6), layout="constrained")
    for axes, panel in zip(grid.flat, panels, strict=True):
        for kind, (colour, marker) in STYLES.items():
            points = sorted((bytes_, accuracy) for bytes_, accuracy, _ in panel["results"].get(kind, []))
            line = ":" if kind == "here, without training" else ""
            axes.plot(*zip(*points, strict=True) if points else ([], []), f"{marker}{line}", ms=8, c=colour, label=kind)
        axes.set_xscale("log")
        axes.set_xticks(panel["ticks"])
        axes.xaxis.set_major_formatter(FuncFormatter(size))
        axes.xaxis.minorticks_off()
        axes.set(xlim=panel["xlim"], ylim=panel["ylim"], xlabel="bytes of the file", title=panel["title"])
        axes.grid(alpha=0.25)
    for axes in grid[:, 0]:
        axes.set(ylabel="accuracy (%)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False)
    for axes, panel in zip(grid.flat, panels, strict=True):
        points = list(itertools.chain(*panel["results"].values()))
        label_points(axes, [(bytes_, accuracy) for bytes_, accuracy, _ in points], [what for _, _, what in points])
    figure.savefig(HERE / "front.png", dpi=130)


if __name__ == "__main__":
    main()
