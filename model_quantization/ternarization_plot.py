"""What a run did to a network, over its epochs and over its layers: `--plot-ternarization`."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from engine.store.checkpoint import Content
from engine.store.run_folder import Record, Run
from model_quantization.drawing import (
    DARK,
    GREEN,
    GREY,
    NEGATIVE,
    POSITIVE,
    ZERO,
    draw_bars,
    draw_sizes,
    name_layers,
    save_figure,
    stack,
)

HISTOGRAMS = 4  # layers whose weights are shown, from the input to the output
BINS = 61


def plot_ternarization(content: Content, run: Run, result: Record, before: dict[str, Tensor]) -> Path:
    """Draw a run over its epochs on the left, its layers at the best epoch on the right, some layers' weights below.

    Args:
        content: the best epoch's checkpoint: `assignments` and `centroids` by layer, and `layers`, the state of
            `QuantizedLayers`.
        run: which has the log of all epochs.
        result: of the run.
        before: the weights by name as they were before the run.
    """
    names = list(content["assignments"])
    figure = Figure(figsize=(17, 15), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(4, 1))[:, 0]
    axes = upper.subplots(4, 2)
    _draw_epochs(axes[:, 0], run.log, result)
    _draw_layers(axes[:, 1], content)
    _share_legend(figure, [*axes[:3].flat, axes[3, 0]])
    after = dict(zip(names, trained_weights(content), strict=True))
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, HISTOGRAMS).round().astype(int))]
    for place, name in zip(lower.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        _draw_weights(place, before[name], after[name], content["centroids"][name].tolist(), name)
    figure.suptitle(
        f"{run.label}: {result['accuracy']:.2f}% accuracy at {result['zeros']:.2f}% zeros "
        f"({result['phase']} epoch {result['epoch']})"
    )
    return save_figure(figure, run.folder / "ternarization.png")


def _draw_epochs(axes: np.ndarray, log: list[Record], result: Record) -> None:
    """Accuracy, loss, zeros and centroids over the epochs, each on axes of its own."""
    epochs = np.arange(len(log))
    trained = [i for i in epochs if log[i]["train_loss"] is not None]
    for place, key, what in ((axes[0], "accuracy", "accuracy (%)"), (axes[1], "loss", "loss (nats)")):
        validated = "accuracy" if key == "accuracy" else "val_loss"
        place.plot(epochs, [r[validated] for r in log], "o-", ms=3, color=DARK, label="validation")
        place.plot(trained, [log[i][f"train_{key}"] for i in trained], "^:", ms=3, color=GREY, label="training")
        place.set(ylabel=what)
    names = list(log[0]["layers"])
    shares = np.array([[r["layers"][n]["clusters"][1] / sum(r["layers"][n]["clusters"]) for n in names] for r in log])
    picture = axes[2].imshow(100 * shares.T, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    axes[2].set(ylabel="layer, from the input on")
    axes[2].figure.colorbar(picture, ax=axes[2], label="zeros (%)")
    steps = np.array([[r["layers"][n]["centroids"] for n in names] for r in log])  # [epochs, layers, 2]
    axes[3].plot(epochs, steps[..., 0], "-", lw=0.8, color=POSITIVE, label="$+w_p$")
    axes[3].plot(epochs, -steps[..., 1], "--", lw=0.8, color=NEGATIVE, label="$-w_n$")
    axes[3].set(ylabel="centroids of all layers", xlabel="epoch")
    frozen = next((i for i, r in enumerate(log) if r["phase"] == "retrain"), None)
    best = next(i for i, r in enumerate(log) if (r["phase"], r["epoch"]) == (result["phase"], result["epoch"]))
    for place in axes:
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
        place.set(xlim=(-0.5, len(log) - 0.5))
        if place is not axes[2]:
            place.axvline(best, color=GREEN, lw=4, alpha=0.3, label="best epoch")
        if frozen is not None:
            place.axvline(frozen - 0.5, color=GREY, ls=":", label="assignment frozen from here")


def _draw_layers(axes: np.ndarray, content: Content) -> None:
    """Each layer's size, clusters, centroids and entropy."""
    names, assignments = list(content["assignments"]), list(content["assignments"].values())
    shares = torch.tensor([[(a.sign() == sign).double().mean() for a in assignments] for sign in (-1, 0, 1)]).numpy()
    w_p, w_n = (np.array(values) for values in zip(*(c.tolist() for c in content["centroids"].values()), strict=True))
    layers = np.arange(len(names))
    draw_sizes(axes[0], [a.numel() for a in assignments])
    stack(axes[1], shares, (NEGATIVE, ZERO, POSITIVE), ("weights below 0", "weights of 0", "weights above 0"))
    axes[2].plot(layers, w_p, "^", ms=4, color=POSITIVE, label="$+w_p$")
    axes[2].plot(layers, -w_n, "v", ms=4, color=NEGATIVE, label="$-w_n$")
    axes[2].axhline(0, color=ZERO)
    axes[2].set(ylabel="centroid")
    values = max(3, *(int(a.max() - a.min()) + 1 for a in assignments))
    draw_bars(axes[3], [entropy(a) for a in assignments], 0, color=GREY)
    axes[3].axhline(np.log2(values), color=DARK, ls=":")
    axes[3].annotate(f"log2({values})", (layers[-1], np.log2(values)), ha="right", va="bottom", fontsize=8)
    axes[3].set(ylabel="entropy (bit a weight)", ylim=(0, 1.15 * np.log2(values)))
    name_layers(list(axes), names)


def _draw_weights(axes: Axes, before: Tensor, after: tuple[Tensor, Tensor], steps: Sequence[float], name: str) -> None:
    """A layer's weights before and after the run, where the levels are and where an assignment ends."""
    weights, assignment = after
    reach = max(before.abs().max().item(), weights.abs().max().item())
    edges = np.linspace(-reach, reach, BINS).tolist()
    axes.hist(before.float().flatten().numpy(), edges, histtype="stepfilled", color=ZERO, label="before")
    axes.hist(weights.numpy(), edges, histtype="step", color=DARK, label="after")
    for level in assignment.unique().tolist():
        axes.axvline(level * steps[level < 0], color=GREEN, lw=0.8, label="levels" if level == 0 else None)
    for threshold in observed_thresholds(weights, assignment):
        axes.axvline(threshold, color=POSITIVE, lw=0.8, ls="--")
    axes.set_title(f"{name.removesuffix('.weight')} (dashed: thresholds)", fontsize=8)
    axes.set(yticks=[])
    axes.legend(fontsize=7, loc="upper right")


def _share_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend at the right for all of `axes`, each kind of line once."""
    found = [zip(*place.get_legend_handles_labels(), strict=True) for place in axes]
    kinds = {label: handle for pairs in found for handle, label in pairs}
    figure.legend(kinds.values(), kinds.keys(), loc="outside right upper")


def trained_weights(content: Content) -> list[tuple[Tensor, Tensor]]:
    """Each layer's full-precision weights and assignment as flat tensors, as far as they were trained."""
    weights, assigned = content["layers"]["weights"], content["layers"]["assignment"]
    first, found = 0, []
    for assignment in content["assignments"].values():
        rows = -(-assignment.numel() // weights.shape[1])
        part = slice(first, first + rows)
        found.append(tuple(each[part].flatten()[: assignment.numel()] for each in (weights, assigned)))
        first += rows
    return found


def observed_thresholds(weights: Tensor, assignment: Tensor) -> list[float]:
    """Halfway between the weights on either side of each edge between two levels; none where they overlap."""
    levels, edges = assignment.unique().tolist(), []
    for low, high in itertools.pairwise(levels):
        below, above = weights[assignment == low].max().item(), weights[assignment == high].min().item()
        if below <= above:
            edges.append((below + above) / 2)
    return edges


def entropy(assignment: Tensor) -> float:
    """First-order entropy of a layer's assignment, in bits a weight."""
    p = assignment.unique(return_counts=True)[1].double() / assignment.numel()
    return -torch.xlogy(p, p).sum().item() / np.log(2)
