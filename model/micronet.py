"""MicroNet, the residual network that the EC2T authors scaled for the 2019 MicroNet Challenge.

Marban et al., "Learning Sparse & Ternary Neural Networks with Entropy-Constrained Trained
Ternarization (EC2T)", arXiv:2004.01077.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from model.dropout import Dropout
from model.registry import MAX_MULTIPLIER


@dataclass(frozen=True)
class Layout:
    """MicroNet before scaling: the stem's channels, and each stage's blocks, channels and stride."""

    stem: int
    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    dropout: float
    num_classes: int


LAYOUTS = {
    "cifar_micronet": Layout(16, (7, 7, 7), (16, 32, 64), (1, 2, 2), 0.2, 100),
    "imagenet_micronet": Layout(
        32, (1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320), (2, 1, 2, 2, 2, 1, 1), 0.0, 1000
    ),
}


def scale_depth(blocks: int, multiplier: float) -> int:
    """Number of blocks of a stage after depth scaling: rounded up (EfficientNet, arXiv:1905.11946), at least 1."""
    return max(1, math.ceil(round(blocks * multiplier, 9)))  # 9 digits: 7 * sqrt(2)^2 are 14, not 15


def scale_width(channels: int, multiplier: float) -> int:
    """Number of channels after width scaling: the nearest multiple of 8, never 10% below (EfficientNet)."""
    scaled = channels * multiplier
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class Block(nn.Module):
    """Residual block: bn1, conv1, bn2, ReLU, dropout, conv2, bn3, plus the shortcut; no ReLU after the sum."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.bn1(x))
        out = self.dropout(F.relu(self.bn2(out)))
        out = self.bn3(self.conv2(out))
        return out + self.shortcut(x)


class MicroNet(nn.Module):
    """MicroNet scaled by `depth` and `width`. Images [N, 3, H, W] in, logits [N, num_classes] out."""

    def __init__(self, layout: Layout, depth: float, width: float, num_classes: int):
        super().__init__()
        channels = scale_width(layout.stem, width)
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.num_stages = len(layout.blocks)
        for stage in range(self.num_stages):
            channels_out = scale_width(layout.channels[stage], width)
            blocks = []
            for i in range(scale_depth(layout.blocks[stage], depth)):
                stride = layout.strides[stage] if i == 0 else 1
                blocks.append(Block(channels, channels_out, stride, layout.dropout))
                channels = channels_out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # of the fan-in, as in 2019

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(self.num_stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        x = F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1)
        return self.linear(x)


def micronet(name: str, depth: float = 1.0, width: float = 1.0, num_classes: int | None = None) -> MicroNet:
    """Build `cifar_micronet` or `imagenet_micronet`; `depth` and `width` are the multipliers d^phi and w^phi.

    ValueError where one is not above 0 and at most MAX_MULTIPLIER.
    """
    for part, multiplier in (("depth", depth), ("width", width)):
        if not 0 < multiplier <= MAX_MULTIPLIER:
            raise ValueError(f"the {part} multiplier {multiplier:g} is not above 0 and at most {MAX_MULTIPLIER:g}")
    layout = LAYOUTS[name]
    return MicroNet(layout, depth, width, num_classes or layout.num_classes)


def multipliers_of(name: str, state_dict: Mapping[str, Tensor]) -> dict[str, float] | None:
    """The multipliers `depth` and `width` of the MicroNet `name` that `state_dict` belongs to; None if it can't.

    They are the shortest decimals that give the same blocks and channels.
    """
    blocks: dict[int, int] = {}
    channels: dict[int, int] = {}
    for key, tensor in state_dict.items():
        if (match := re.fullmatch(r"layer(\d)\.(\d{1,3})\.conv2\.weight", key)) and tensor.ndim == 4:
            stage, block = int(match[1]), int(match[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
            channels[stage] = tensor.shape[0]
    layout = LAYOUTS[name]
    if sorted(blocks) != list(range(1, len(layout.blocks) + 1)):
        return None
    depth = _multiplier(scale_depth, layout.blocks, [blocks[stage] for stage in sorted(blocks)])
    width = _multiplier(scale_width, layout.channels, [channels[stage] for stage in sorted(channels)])
    return {"depth": depth, "width": width} if depth and width else None


def _multiplier(scale: Callable[[int, float], int], base: tuple[int, ...], scaled: list[int]) -> float | None:
    """The shortest decimal that `scale` turns `base` into `scaled` with; None if there is none."""
    for digits in range(4):
        step = 10**digits
        for numerator in range(1, int(MAX_MULTIPLIER) * step + 1):
            multiplier = numerator / step
            if all(scale(b, multiplier) == s for b, s in zip(base, scaled, strict=True)):
                return multiplier
    return None
