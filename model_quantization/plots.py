"""Plots of what ternarization did to a network."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from engine.runs import Run  # noqa: E402
from model_quantization import ec2t  # noqa: E402

POSITIVE, ZERO, NEGATIVE = "#c2553f", "#d9d9d9", "#3f6fa8"


def plot_ternarization(content: dict, run: Run, result: dict) -> Path:
    """Draw accuracy and zeros over the epochs, and each layer's clusters, centroids and entropy at the best epoch.

    Args:
        content: the best epoch's checkpoint, with `assignments` and `centroids`.
    """
    assignments, centroids = content["assignments"].values(), content["centroids"].values()
    n_p, n_n, numel = (
        torch.tensor(counts, dtype=torch.float64)
        for counts in zip(*(((a > 0).sum().item(), (a < 0).sum().item(), a.numel()) for a in assignments))
    )
    w_p, w_n = (np.array(values) for values in zip(*(c.tolist() for c in centroids)))
    layers = np.arange(len(numel))

    figure, axes = plt.subplots(4, 1, figsize=(11, 12), constrained_layout=True)
    history = [record for record in run.history if record]
    epochs = np.arange(len(history))
    axes[0].plot(epochs, [r["accuracy"] for r in history], "o-", ms=3, color="#333333", label="accuracy")
    axes[0].plot(epochs, [r["zeros"] for r in history], "s-", ms=3, color="#3f8f5f", label="zeros")
    frozen = next((i for i, r in enumerate(history) if r["phase"] == "retrain"), None)
    if frozen is not None:
        axes[0].axvline(frozen - 0.5, color="#999999", ls=":", label="assignment frozen from here")
    axes[0].set(xlabel="epoch", ylabel="percent")
    axes[0].legend()

    zeros = 1 - (n_p + n_n) / numel
    axes[1].bar(layers, n_n / numel, 1, color=NEGATIVE, label="$-w_n$")
    axes[1].bar(layers, zeros, 1, bottom=n_n / numel, color=ZERO, label="0")
    axes[1].bar(layers, n_p / numel, 1, bottom=n_n / numel + zeros, color=POSITIVE, label="$+w_p$")
    axes[1].set(ylabel="share of weights", ylim=(0, 1))
    axes[2].plot(layers, w_p, "^", ms=4, color=POSITIVE, label="$+w_p$")
    axes[2].plot(layers, -w_n, "v", ms=4, color=NEGATIVE, label="$-w_n$")
    axes[2].axhline(0, color=ZERO)
    axes[2].set(ylabel="centroid")
    axes[3].bar(layers, ec2t.entropy(n_p, n_n, numel), 1, color="#8a8a8a")
    axes[3].set(ylabel="entropy (bit a weight)", xlabel="layer, from the input on", ylim=(0, np.log2(3)))
    for axis in axes[1:]:
        axis.set_xlim(-0.5, len(layers) - 0.5)
    for axis in axes[1:3]:
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(
        f"{run.label}: {result['accuracy']:.2f}% accuracy at {result['zeros']:.2f}% zeros "
        f"({result['phase']} epoch {result['epoch']})"
    )
    picture = run.folder / "ternarization.png"
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture
