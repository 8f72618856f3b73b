"""Plots of a sweep: its pairs side by side, and the best one's layers."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from engine.program.report import short
from engine.store.run_folder import Record
from model_quantization.drawing import (
    DARK,
    GREEN,
    GREY,
    NEGATIVE,
    POSITIVE,
    ZERO,
    draw_sizes,
    label_points,
    name_layers,
    save_figure,
    stack,
)

INCH_A_LAYER = 0.16


def plot_sweep(results: list[Record], best: int, lines: dict[str, float], title: str, path: Path) -> Path:
    """Draw the accuracy of every grid point, with parameters of 16 bit, over its zeros and over its score.

    Args:
        results: of all finished pairs.
        best: which of them is the best.
        lines: accuracies to draw across, percent, by what they are.
        title: of the plot.
        path: of the PNG; a PDF is written beside it.
    """
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    rulers = " or ".join(dict.fromkeys(r["ruler"] for r in results))
    for place, key, name in zip(axes, ("zeros", "score"), ("zeros (%)", f"score, {rulers} ruler"), strict=True):
        _draw_pairs(place, results, best, key)
        for (what, value), style in zip(lines.items(), ("--", ":"), strict=False):
            place.axhline(value, color=GREY, ls=style, label=f"{what}, {value:.2f}%")
        place.set(xlabel=name)
    axes[0].set(ylabel="accuracy at 16 bit (%)")
    one = results[best]
    text = f"best: {one['accuracy_16_bit']:.2f}%, {one['zeros']:.2f}% zeros, score {one['score']:.5f}"
    figure.suptitle(f"{title} (points are named s, g; {text})")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    for place, key in zip(axes, ("zeros", "score"), strict=True):
        points = [(r[key], r["accuracy_16_bit"]) for r in results]
        label_points(place, points, [f"{short(r['s'])}, {r['g']:g}" for r in results])
    return save_figure(figure, path)


def _draw_pairs(axes: Axes, results: list[Record], best: int, key: str) -> None:
    x, accuracy = (np.array([r[k] for r in results]) for k in (key, "accuracy_16_bit"))
    front = pareto_front(x if key == "zeros" else -x, accuracy)
    if len(results) > 1:
        axes.step(x[front], accuracy[front], color=GREEN, lw=5, alpha=0.25, label="Pareto front")
    for number, s in enumerate(sorted({r["s"] for r in results}, key=str)):
        own = sorted((i for i, r in enumerate(results) if r["s"] == s), key=lambda i: results[i]["g"])
        axes.plot(
            x[own], accuracy[own], f"{'osD^v<>ph*'[number % 10]}:", color=f"C{number % 10}", label=f"s {short(s)}"
        )
    axes.plot(x[best], accuracy[best], "o", ms=13, mfc="none", mec=POSITIVE, label="best")
    axes.margins(0.15)


def pareto_front(zeros: np.ndarray, accuracy: np.ndarray) -> list[int]:
    """The points that no other one reaches in both zeros and accuracy, from the most zeros down."""
    front, highest = [], -np.inf
    for i in np.lexsort((-accuracy, -zeros)):
        if accuracy[i] > highest:
            front.append(int(i))
            highest = accuracy[i]
    return front


def kept_and_deleted(assignment: Tensor) -> tuple[float, float, float]:
    """Shares of a layer's weights `[c_out, c_in, ...]`: kept, deleted within kernels, deleted as whole channels.

    A channel counts as deleted where the weights of an output channel or of an input channel are all zero.
    """
    kept = assignment != 0
    kernels = kept.flatten(2).any(2) if kept.ndim > 2 else kept  # [c_out, c_in]
    live = kernels.any(1)[:, None] & kernels.any(0)[None]
    share, whole = kept.double().mean().item(), 1 - live.double().mean().item()
    return share, 1 - whole - share, whole


def plot_layers(assignments: dict[str, Tensor], result: Record, title: str, path: Path) -> Path:
    """Draw each layer's size, and its weights as kept, deleted within kernels, and deleted as whole channels."""
    shares = np.array([kept_and_deleted(assignment) for assignment in assignments.values()])
    figure = Figure(figsize=(max(8, INCH_A_LAYER * len(shares) + 3), 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 2))
    draw_sizes(above, [assignment.numel() for assignment in assignments.values()])
    stack(below, shares.T, (DARK, ZERO, NEGATIVE), ("kept", "deleted within kernels", "deleted channels"))
    name_layers([above, below], list(assignments))
    figure.legend(*below.get_legend_handles_labels(), loc="outside right upper")
    pair = f"s {short(result['s'])}, g {result['g']:g}"
    figure.suptitle(f"{title}: {result['accuracy']:.2f}% at {result['zeros']:.2f}% zeros ({pair})")
    return save_figure(figure, path)
