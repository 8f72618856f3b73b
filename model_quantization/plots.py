"""Plots of what ternarization did to a network."""

import io
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from engine.program.report import short
from engine.store.checkpoint import Content
from engine.store.files import write_whole
from engine.store.run_folder import Record, Run

POSITIVE, ZERO, NEGATIVE = "#c2553f", "#d9d9d9", "#3f6fa8"
DARK, GREEN, GREY = "#333333", "#3f8f5f", "#8a8a8a"
NAMED = 60  # layers whose names can be read


def plot_ternarization(content: Content, run: Run, result: Record) -> Path:
    """Draw a run over its epochs on the left, and its layers at the best epoch on the right.

    Args:
        content: the best epoch's checkpoint, with `assignments` and `centroids` by layer.
        run: which has the log of all epochs.
        result: of the run.
    """
    figure = Figure(figsize=(15, 11), layout="constrained")
    axes = figure.subplots(4, 2)
    _draw_epochs(axes[:, 0], run.log, result)
    _draw_layers(axes[:, 1], content)
    figure.suptitle(
        f"{run.label}: {result['accuracy']:.2f}% accuracy at {result['zeros']:.2f}% zeros "
        f"({result['phase']} epoch {result['epoch']})"
    )
    return _save(figure, run.folder / "ternarization.png")


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
    axes[0].legend(fontsize=8)
    handles, labels = axes[3].get_legend_handles_labels()
    kinds = dict(zip(labels, handles, strict=True))  # one entry a kind of line, however many layers
    axes[3].legend([kinds["$+w_p$"], kinds["$-w_n$"]], ["$+w_p$", "$-w_n$"], fontsize=8)


def _draw_layers(axes: np.ndarray, content: Content) -> None:
    """Each layer's size, clusters, centroids and entropy."""
    names, assignments = list(content["assignments"]), list(content["assignments"].values())
    shares = torch.tensor([[(a.sign() == sign).double().mean() for a in assignments] for sign in (-1, 0, 1)]).numpy()
    w_p, w_n = (np.array(values) for values in zip(*(c.tolist() for c in content["centroids"].values()), strict=True))
    layers = np.arange(len(names))
    axes[0].bar(layers, [a.numel() for a in assignments], 1, color=DARK)
    axes[0].set(ylabel="weights", yscale="log")
    _stack(axes[1], shares, (NEGATIVE, ZERO, POSITIVE), ("below 0", "0", "above 0"))
    axes[2].plot(layers, w_p, "^", ms=4, color=POSITIVE, label="$+w_p$")
    axes[2].plot(layers, -w_n, "v", ms=4, color=NEGATIVE, label="$-w_n$")
    axes[2].axhline(0, color=ZERO)
    axes[2].set(ylabel="centroid")
    axes[2].legend(loc="upper left", bbox_to_anchor=(1, 1))
    bound = np.log2(max(3, *(int(a.max() - a.min()) + 1 for a in assignments)))
    axes[3].bar(layers, [entropy(a) for a in assignments], 1, color=GREY)
    axes[3].axhline(bound, color=DARK, ls=":", label=f"log2({2**bound:.0f})")
    axes[3].set(ylabel="entropy (bit a weight)", ylim=(0, 1.1 * bound), xlabel="layer, from the input on")
    axes[3].legend(loc="upper left", bbox_to_anchor=(1, 1))
    for place in axes:
        place.set(xlim=(-0.5, len(layers) - 0.5))
    if len(names) <= NAMED:
        for place in axes:
            place.set_xticks(layers, [""] * len(layers))
        axes[3].set_xticks(layers, [name.removesuffix(".weight") for name in names], rotation=90, fontsize=7)
        axes[3].set(xlabel="")


def entropy(assignment: Tensor) -> float:
    """First-order entropy of a layer's assignment, in bits a weight."""
    p = assignment.unique(return_counts=True)[1].double() / assignment.numel()
    return -torch.xlogy(p, p).sum().item() / np.log(2)


def plot_sweep(results: list[Record], best: int, threshold: float | None, title: str, path: Path) -> Path:
    """Draw accuracy over zeros of every grid point, the Pareto front, and the accuracy to hold where there is one."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    zeros, accuracy = (np.array([r[key] for r in results]) for key in ("zeros", "accuracy"))
    front = pareto_front(zeros, accuracy)
    axes.step(zeros[front], accuracy[front], color=GREEN, lw=5, alpha=0.25, label="Pareto front")
    for number, s in enumerate(sorted({r["s"] for r in results}, key=str)):
        points = sorted((r["g"], r["zeros"], r["accuracy"]) for r in results if r["s"] == s)
        marker = "osD^v<>ph*"[number % 10]
        _, *place = zip(*points, strict=True)
        axes.plot(*place, f"{marker}:", color=f"C{number % 10}", label=f"s {short(s)}")
        for g, x, y in points:
            axes.annotate(f"{g:g}", (x, y), xytext=(4, 5), textcoords="offset points", fontsize=8, rotation=30)
    axes.plot(zeros[best], accuracy[best], "o", ms=13, mfc="none", mec=POSITIVE, label="best")
    if threshold is not None:
        axes.axhline(threshold, color=GREY, ls="--", label=f"{threshold:g}% to hold")
    axes.margins(0.1)
    axes.set(xlabel="zeros (% of all parameters)", ylabel="accuracy (%)", title=f"{title} (numbers: g)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


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
    """Draw each layer's weights as kept, deleted within kernels, and deleted as whole channels."""
    shares = [kept_and_deleted(assignment) for assignment in assignments.values()]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    _stack(axes, np.array(shares).T, (DARK, ZERO, NEGATIVE), ("kept", "deleted within kernels", "deleted channels"))
    axes.set(xlabel="layer, from the input on")
    pair = f"s {short(result['s'])}, g {result['g']:g}"
    figure.suptitle(f"{title}: {result['accuracy']:.2f}% at {result['zeros']:.2f}% zeros ({pair})")
    return _save(figure, path)


def _stack(axes: Axes, shares: np.ndarray, colours: tuple[str, ...], labels: tuple[str, ...]) -> None:
    """Stacked bars, one a layer, of shares `[kinds, layers]` that sum to 1."""
    layers = np.arange(shares.shape[1])
    for share, bottom, colour, label in zip(shares, np.cumsum(shares, 0) - shares, colours, labels, strict=True):
        axes.bar(layers, share, 1, bottom=bottom, color=colour, label=label)
    axes.set(ylabel="share of weights", ylim=(0, 1), xlim=(-0.5, len(layers) - 0.5))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _save(figure: Figure, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    write_whole(picture.getbuffer(), path)
    return path
