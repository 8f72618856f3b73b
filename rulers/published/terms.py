"""What the closed forms share: a layer with its BatchNorms, and the terms of storage and operations."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.selection import is_ternary
from rulers.tally import Line

# Operations per element as (multiplications, additions), by the rules of the challenge.
RELU, SWISH, SIGMOID = (1, 0), (3, 1), (2, 1)


@dataclass(frozen=True)
class Layer:
    """A convolution or the classifier, with the BatchNorms that a closed form counts with it."""

    name: str
    module: nn.Conv2d | nn.Linear
    norms: tuple[nn.BatchNorm2d, ...] = ()

    @property
    def weight(self) -> Tensor:
        """[c_out, c_in, k, k] of a convolution, c_in = 1 if depthwise; [c_out, c_in] of the classifier."""
        return self.module.weight.detach()

    @property
    def channels_out(self) -> int:
        return self.weight.shape[0]

    @property
    def channels_in(self) -> int:
        return self.weight.shape[1]

    @property
    def kernel(self) -> int:
        return self.weight.shape[-1]

    @property
    def merged_params(self) -> int:
        """Parameters once BatchNorm is merged: the weights and a bias per output channel.

        Quirk: `params` counts so for EfficientNet, and for MicroNet but for its ternary convolutions, whose
        BatchNorms count in full. It is therefore smaller than the number of the network's parameters.
        """
        return self.weight.numel() + self.channels_out

    def line(self, note: str, bits: float, mults: float, adds: float) -> Line:
        """The layer's line, with all parameters of its modules."""
        parameters = [p for module in (self.module, *self.norms) for p in module.parameters()]
        numel = sum(p.numel() for p in parameters)
        nonzero = sum(count_nonzero(p) for p in parameters)
        return Line(self.name, bits, mults, adds, numel, nonzero, note)


def count_nonzero(tensor: Tensor) -> int:
    return int(torch.count_nonzero(tensor))


def out_size(size: int, div: float, kernel: int, stride: int, padding: int) -> int:
    """Height and width of the output of a convolution whose input has size * div.

    Quirk: the quotient is rounded up, where a convolution rounds down.
    """
    return math.ceil((math.ceil(size * div) + 2 * padding - kernel) / stride + 1)


def stored_as(weight: Tensor, numel: int, nonzero: int, ternary: bool) -> str:
    """How a layer's weights, `nonzero` of `numel`, are stored; `ternary` is what the form assumes."""
    if ternary and is_ternary(weight):
        return "ternary"
    return "sparse" if nonzero < numel else "dense"


def weight_bits(note: str, numel: int, nonzero: int, b: int) -> int:
    """Bits of weights: two masks and two values if ternary, else the values and, if sparse, one mask."""
    if note == "ternary":
        return 2 * numel + 2 * b
    return nonzero * b + (numel if note == "sparse" else 0)


def weight_mults(note: str, v: float, n: int) -> float:
    """Multiplications of `n` outputs: by the two values if ternary, else by the values that are not zero."""
    return 2 * n if note == "ternary" else v * n


def activated(line: Line, activation: tuple[int, int], n: int) -> Line:
    """Add the operations of `activation` on `n` elements to `line`."""
    line.mults += activation[0] * n
    line.adds += activation[1] * n
    return line


def pooled(line: Line, out: int, channels: int) -> Line:
    """Add the average over `out` x `out` elements of each channel to `line`."""
    line.mults += channels
    line.adds += (out**2 - 1) * channels
    return line
