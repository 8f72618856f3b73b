"""A network of one's own in one file: KAIST AI's, second on CIFAR-100 in the MicroNet Challenge of 2019.

Inverted residual blocks with squeeze-and-excitation behind the projection, built from the description of the
authors' published files (github.com/Kthyeon/KAIST-AI-NeurIPS2019-MicroNet-2nd-place-solution, MIT), which hold 80% of
the test images right at 15 to 60% zeros. These files have a mask beside each weight; reading them multiplies the two.

    run_quantization.py --model examples/kaist_micronet.py:v2 --model-dict kaist_v2_45.t7 --dataset CIFAR100 ...
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# of each stage: channels out, blocks, stride of the first
V1 = ((16, 2, 1), (32, 1, 2), (32, 1, 1), (48, 3, 1), (72, 1, 2), (72, 4, 1), (80, 1, 2), (88, 2, 1), (106, 1, 1))
V2 = ((20, 2, 1), (36, 1, 2), (36, 1, 1), (56, 3, 1), (80, 1, 2), (80, 4, 1), (88, 1, 2), (96, 2, 1), (114, 1, 1))

# mean and standard deviation: what this toolkit normalises CIFAR's images by, and what the authors did
OURS = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
THEIRS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


class Block(nn.Module):
    """1x1 to `expanded` channels, 3x3 depthwise, 1x1 to `c_out`; with stride 1 scaled, and added to a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: float):
        super().__init__()
        expanded = int(expansion * c_in)
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(c_in, expanded, 1, bias=False), nn.BatchNorm2d(expanded)
        self.conv2 = nn.Conv2d(expanded, expanded, 3, stride, 1, groups=expanded, bias=False)
        self.bn2 = nn.BatchNorm2d(expanded)
        self.conv3, self.bn3 = nn.Conv2d(expanded, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        # blocks of stride 2 never run these two, but the published files have them
        self.fc1, self.fc2 = nn.Conv2d(c_out, c_out // 4, 1), nn.Conv2d(c_out // 4, c_out, 1)
        self.shortcut = nn.Sequential()
        if stride == 1 and c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.hardswish(self.bn1(self.conv1(x)))
        out = F.hardswish(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return out
        scale = self.fc2(F.hardswish(self.fc1(F.adaptive_avg_pool2d(out, 1)))).sigmoid()
        return out * scale + self.shortcut(x)


class Kaist(nn.Module):
    """Images `[N, 3, 32, 32]`, normalised by OURS, to logits `[N, num_classes]`."""

    def __init__(self, stages: tuple[tuple[int, int, int], ...], expansion: float, num_classes: int):
        super().__init__()
        (our_mean, our_std), (mean, std) = (torch.tensor(statistics)[..., None, None] for statistics in (OURS, THEIRS))
        self.register_buffer("scale", our_std / std, persistent=False)
        self.register_buffer("shift", (our_mean - mean) / std, persistent=False)
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)
        blocks, c_in = [], 32
        for c_out, number, stride in stages:
            for i in range(number):
                blocks.append(Block(c_in, c_out, stride if i == 0 else 1, expansion))
                c_in = c_out
        self.layers, self.linear = nn.Sequential(*blocks), nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.shift
        x = self.layers(F.hardswish(self.bn1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def v1(num_classes: int = 100) -> nn.Module:
    """The network of the entry."""
    return Kaist(V1, 3, num_classes)


def v2(num_classes: int = 100) -> nn.Module:
    """The authors' later, wider one."""
    return Kaist(V2, 2.5, num_classes)
