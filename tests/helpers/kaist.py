"""KAIST AI's entry to the MicroNet Challenge, second on CIFAR-100, built from its description.

Inverted residual blocks with squeeze-and-excitation behind the projection; beside each pruned weight stands a mask, and
the network computes with their product.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = ((16, 2, 1), (32, 1, 2), (32, 1, 1), (48, 3, 1), (72, 1, 2), (72, 4, 1), (80, 1, 2), (88, 2, 1), (106, 1, 1))
EXPANSION = 3
FILES = Path(os.environ.get("KAIST_FILES", Path(__file__).parents[3] / "shared" / "reference"))


class MaskedConv(nn.Conv2d):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class MaskedLinear(nn.Linear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        e = int(EXPANSION * c_in)
        self.stride = stride
        self.conv1, self.bn1 = MaskedConv(c_in, e, 1, bias=False), nn.BatchNorm2d(e)
        self.conv2, self.bn2 = MaskedConv(e, e, 3, stride, 1, groups=e, bias=False), nn.BatchNorm2d(e)
        self.conv3, self.bn3 = MaskedConv(e, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        if stride == 1 and c_in != c_out:
            self.shortcut = nn.Sequential(MaskedConv(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        else:
            self.shortcut = nn.Sequential()
        self.fc1, self.fc2 = MaskedConv(c_out, int(c_out / 4), 1), MaskedConv(int(c_out / 4), c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.hardswish(self.bn1(self.conv1(x)))
        out = F.hardswish(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return out
        scale = F.adaptive_avg_pool2d(out, 1)
        scale = torch.sigmoid(self.fc2(F.hardswish(self.fc1(scale))))
        return out * scale + self.shortcut(x)


class Kaist(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = MaskedConv(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)
        blocks, c_in = [], 32
        for c_out, repeats, stride in BLOCKS:
            for i in range(repeats):
                blocks.append(Block(c_in, c_out, stride if i == 0 else 1))
                c_in = c_out
        self.layers, self.linear = nn.Sequential(*blocks), MaskedLinear(c_in, 100)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.hardswish(self.bn1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def entry() -> nn.Module | None:
    """The network with the entry's weights; None where its file is not there."""
    path = FILES / "kaist_v1_60.t7"
    if not path.is_file():
        return None
    network = Kaist()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()
