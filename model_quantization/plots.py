"""Plots of what ternarization did to a network."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from torch import Tensor  # noqa: E402

from engine.files import write_whole  # noqa: E402
from engine.rulers.tally import Task  # noqa: E402
from engine.runs import Run  # noqa: E402

POSITIVE, ZERO, NEGATIVE = "#c2553f", "#d9d9d9", "#3f6fa8"
DARK, GREEN, GREY = "#333333", "#3f8f5f", "#8a8a8a"


def plot_ternarization(content: dict, run: Run) -> Path:
    """Draw accuracy and zeros over the epochs, and each layer's clusters, centroids and entropy at the best epoch.

    Args:
        content: the best epoch's checkpoint, with `assignments` and `centroids` by layer.
    """
    assignments = content["assignments"].values()
    shares = np.array([[(a == value).double().mean().item() for a in assignments] for value in (-1, 0, 1)])
    w_p, w_n = (np.array(values) for values in zip(*(c.tolist() for c in content["centroids"].values())))
    layers = np.arange(shares.shape[1])
    figure, axes = plt.subplots(4, 1, figsize=(11, 12), constrained_layout=True)

    log, result = run.log, run.result
    epochs = np.arange(len(log))
    axes[0].plot(epochs, [r["accuracy"] for r in log], "o-", ms=3, color=DARK, label="accuracy")
    axes[0].plot(epochs, [r["zeros"] for r in log], "s-", ms=3, color=GREEN, label="zeros")
    frozen = next((i for i, r in enumerate(log) if r["phase"] == "retrain"), None)
    if frozen is not None:
        axes[0].axvline(frozen - 0.5, color=GREY, ls=":", label="assignment frozen from here")
    axes[0].set(xlabel="epoch", ylabel="percent")
    axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1))

    _stack(axes[1], shares, (NEGATIVE, ZERO, POSITIVE), ("$-w_n$", "0", "$+w_p$"))
    axes[2].plot(layers, w_p, "^", ms=4, color=POSITIVE, label="$+w_p$")
    axes[2].plot(layers, -w_n, "v", ms=4, color=NEGATIVE, label="$-w_n$")
    axes[2].axhline(0, color=ZERO)
    axes[2].set(ylabel="centroid", xlim=(-0.5, len(layers) - 0.5))
    axes[2].legend(loc="upper left", bbox_to_anchor=(1, 1))
    entropy = -(shares * np.log2(shares, out=np.zeros_like(shares), where=shares > 0)).sum(0)
    axes[3].bar(layers, entropy, 1, color=GREY)
    axes[3].set(ylabel="entropy (bit a weight)", ylim=(0, np.log2(3)), xlim=(-0.5, len(layers) - 0.5))
    axes[3].set(xlabel="layer, from the input on")
    figure.suptitle(
        f"{run.label}: {result['accuracy']:.2f}% accuracy at {result['zeros']:.2f}% zeros "
        f"({result['phase']} epoch {result['epoch']})"
    )
    return _save(figure, run.folder / "ternarization.png")


def plot_sweep(results: list[dict], best: int, task: Task | None, path: Path) -> Path:
    """Draw accuracy over zeros of every grid point, the Pareto front, and the task's threshold where there is one."""
    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    zeros, accuracy = (np.array([r[key] for r in results]) for key in ("zeros", "accuracy"))
    front = [i for i in np.argsort(-zeros) if accuracy[i] == accuracy[zeros >= zeros[i]].max()]
    axes.plot(zeros[front], accuracy[front], "-", color=GREEN, label="Pareto front")
    axes.plot(zeros, accuracy, "o", color=DARK)
    axes.plot(zeros[best], accuracy[best], "o", ms=11, mfc="none", mec=POSITIVE, label="best")
    for result in results:
        label = f"s {result['s']:g}, g {result['g']:g}"
        point = (result["zeros"], result["accuracy"])
        axes.annotate(label, point, xytext=(6, 5), textcoords="offset points", fontsize=8)
    if task:
        axes.axhline(task.threshold_percent, color=GREY, ls=":", label=f"{task.name}'s threshold")
    axes.margins(0.15)
    axes.set(xlabel="zeros (% of all parameters)", ylabel="accuracy (%)")
    axes.legend()
    return _save(figure, path)


def plot_layers(assignments: dict[str, Tensor], result: dict, path: Path) -> Path:
    """Draw each layer's weights as kept, deleted within kernels, and deleted as whole channels.

    A channel counts as deleted with an output channel's or an input channel's weights all zero.
    """
    shares = []
    for assignment in assignments.values():
        kept = assignment != 0
        matrix = kept.flatten(2).any(2) if kept.ndim > 2 else kept  # [c_out, c_in]
        live = matrix.any(1)[:, None] & matrix.any(0)[None]
        whole = 1 - live.double().mean().item()
        shares.append((kept.double().mean().item(), 1 - whole - kept.double().mean().item(), whole))
    figure, axes = plt.subplots(figsize=(11, 4.5), constrained_layout=True)
    _stack(axes, np.array(shares).T, (DARK, ZERO, NEGATIVE), ("kept", "deleted within kernels", "deleted channels"))
    axes.set(xlabel="layer, from the input on")
    figure.suptitle(f"s {result['s']:g}, g {result['g']:g}: {result['accuracy']:.2f}% at {result['zeros']:.2f}% zeros")
    return _save(figure, path)


def _stack(axes: plt.Axes, shares: np.ndarray, colours: tuple[str, ...], labels: tuple[str, ...]) -> None:
    """Stacked bars, one a layer, of shares `[kinds, layers]` that sum to 1."""
    layers = np.arange(shares.shape[1])
    for share, bottom, colour, label in zip(shares, np.cumsum(shares, 0) - shares, colours, labels):
        axes.bar(layers, share, 1, bottom=bottom, color=colour, label=label)
    axes.set(ylabel="share of weights", ylim=(0, 1), xlim=(-0.5, len(layers) - 0.5))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _save(figure: plt.Figure, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    plt.close(figure)
    write_whole(picture.getbuffer(), path)
    return path
