"""A network of one's own, from its first epoch to a packed file, without the three programs.

    python examples/own_network.py

Trains a small residual network on scikit-learn's handwritten digits, makes it ternary, retrains it with frozen
assignment, counts it by the challenge's rules, packs it and predicts from the packed file. On two cores half a minute;
it ends near 98.5% of the test images with 64% of the weights zero, in 7,273 bytes in place of 128,968.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the toolkit lies

import rulers
from model_quantization import EC2T
from model_scoring import pack, unpack


class Block(nn.Module):
    """Two convolutions of `channels`, and a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def digits_network() -> nn.Module:
    """Images `[N, 1, 8, 8]` to logits `[N, 10]`."""
    stem = nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)
    return nn.Sequential(*stem, Block(24), nn.MaxPool2d(2), Block(24), Block(24), *head)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images `[N, 1, 8, 8]` and labels, and those of every fourth image for testing."""
    found = load_digits()
    images, labels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(found.target)
    tested = torch.arange(len(images)) % 4 == 0
    return images[~tested], labels[~tested], images[tested], labels[tested]


def train_epoch(network: nn.Module, optimizer, images: Tensor, labels: Tensor) -> None:
    """One epoch in batches of 64, each image shifted by up to a pixel."""
    network.train()
    for batch in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        shift = torch.randint(-1, 2, (2,)).tolist()
        loss = F.cross_entropy(network(images[batch].roll(shift, (2, 3))), labels[batch])
        loss.backward()
        optimizer.step()


@torch.no_grad()
def right(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy in percent."""
    return 100 * (network.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="of each of the three phases")
    parser.add_argument("--folder", type=Path, default=Path(), help="for the packed file and the pictures")
    args = parser.parse_args()
    torch.manual_seed(0)
    *training, images, labels = digits()
    network, epochs = digits_network(), args.epochs
    log: list[tuple[str, float, float]] = []  # phase, accuracy and zeros in percent of each epoch

    def note(phase: str) -> None:
        parameters = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        zeros = 100 * (parameters == 0).float().mean().item()
        log.append((phase, right(network, images, labels), zeros))
        print(f"{phase:>14} {len(log):3d}  accuracy {log[-1][1]:.2f}%  zeros {zeros:.2f}%")

    adam = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(epochs):
        train_epoch(network, adam, *training)
        note("full precision")

    dense = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    quantizer = EC2T(network, s=0.3, g=0.2)
    for phase in ("ternarize", "retrain"):
        optimizer = quantizer.optimizer(lr=1e-3, lr2=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.adam, T_max=epochs)
        for _ in range(epochs):
            train_epoch(network, optimizer, *training)
            schedule.step()
            note(phase)
        quantizer.freeze()

    tally = rulers.count(network, (1, 8, 8))["challenge"]
    packed = pack(network, args.folder / "digits.safetensors")
    again = unpack(packed.path, digits_network())
    print(f"\n{', '.join(quantizer.names)} are ternary: {quantizer.entropy():.3f} bit a weight")
    scoring = f"{tally.total_scoring_params:,.0f}, {tally.total_mflop:.3f} MFLOP an image"
    print(f"{tally.params:,} parameters count as {scoring}")
    print(f"{packed.float32_bytes:,} bytes of 32-bit values are packed into {packed.file_bytes:,}")
    print(f"{right(network, images, labels):.2f}%, and the packed file is right on the same ", end="")
    print(f"{right(again, images, labels):.2f}%")
    draw_training(log, args.folder / "training.png")
    draw_weights(dense, dict(network.named_parameters()), quantizer.names, args.folder / "weights.png")


def draw_training(log: list[tuple[str, float, float]], path: Path) -> None:
    """Accuracy and zeros over the epochs, each on an axis of its own."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    phases, accuracy, zeros = zip(*log, strict=True)
    epochs = range(1, len(log) + 1)
    upper.plot(epochs, accuracy, color="#333333")
    lower.plot(epochs, zeros, color="#3f8f5f")
    upper.set(ylabel="accuracy (%)", title="Full precision, ternarized, retrained with frozen assignment")
    lower.set(ylabel="zeros (%)", xlabel="epoch")
    for axes in (upper, lower):
        for i in range(1, len(log)):
            if phases[i] != phases[i - 1]:
                axes.axvline(i + 0.5, color="#8a8a8a", ls=":")
    figure.savefig(path, dpi=110)


def draw_weights(before: dict[str, Tensor], after: dict[str, Tensor], names: list[str], path: Path) -> None:
    """Histograms of each quantized layer's weights before, and its clusters after."""
    figure = Figure(figsize=(10, 2.2 * ((len(names) + 2) // 3)), layout="constrained")
    for axes, name in zip(figure.subplots((len(names) + 2) // 3, 3).flat, names, strict=False):
        values, counts = after[name].detach().flatten().unique(return_counts=True)
        axes.hist(before[name].flatten().numpy(), 60, color="#d9d9d9", label="before")
        largest = axes.get_ylim()[1]
        axes.vlines(values, 0, largest * counts / counts.max(), color="#c2553f", lw=3, label="after, to another scale")
        axes.set(title=name, yticks=[])
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
