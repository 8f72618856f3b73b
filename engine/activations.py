"""Evaluation with activations of few bits: what a score with `--act-bits` counts is what is evaluated."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from model.own import every_operation

CANDIDATES = 20  # ranges that are tried, from the whole one down
NARROWEST = 0.4
SAMPLE = 2**18  # values, evenly spread, that the error is measured on

# operations that multiply what they read; BatchNorm is not among them: it merges into the layer before it
MULTIPLYING = (
    *("convolution", "_convolution", "linear", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"),
    *("mul", "div", "mean", "_adaptive_avg_pool2d", "avg_pool2d", "_softmax", "native_layer_norm"),
    *("relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "tanh", "elu", "leaky_relu"),
    *("_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention"),
)


class QuantizedActivations(nn.Module):
    """`network` in evaluation, in which whatever is multiplied has `bits` bits: weights aside, which have their own.

    Each place where something is multiplied has a grid of 2**bits evenly spaced levels, zero among them, that the first
    batch decides, without its labels: of some ranges within that of its values, that with the least squared error of a
    sample of them, the upper end first. Later values outside it are clipped.
    """

    def __init__(self, network: nn.Module, bits: int):
        super().__init__()
        self.network = network
        self._mode = _Mode(network, bits)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        self._mode.begin()
        with every_operation(), self._mode:
            return self.network(images)


class _Mode(TorchDispatchMode):
    def __init__(self, network: nn.Module, bits: int):
        super().__init__()
        self._steps = 2**bits - 1
        self._stored = {_storage(tensor) for tensor in (*network.parameters(), *network.buffers())}
        self._grids: list[tuple[Tensor, Tensor]] = []
        self._place = 0

    def begin(self) -> None:
        """The next operation is the network's first."""
        self._place = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in MULTIPLYING:
            args, kwargs = tree_map(self._quantized, (args, kwargs))
        elif name.removesuffix("_") in MULTIPLYING:  # in place
            args[0].copy_(self._quantized(args[0]))
            args = (args[0], *tree_map(self._quantized, args[1:]))
        return func(*args, **kwargs)

    def _quantized(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or _storage(value) in self._stored:
            return value
        if self._place == len(self._grids):
            self._grids.append(self._grid(value))
        step, zero = self._grids[self._place]
        self._place += 1
        return self._rounded(value, step, zero)

    def _rounded(self, value: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        return (value / step + zero).round_().clamp_(0, self._steps).sub_(zero).mul_(step)

    def _grid(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The step, and the place of zero among the 2**bits levels, of the range with the least squared error."""
        some = values.flatten()[:: 1 + values.numel() // SAMPLE // 2 * 2]  # an odd step meets all channels and places

        def grid(ends: list[Tensor]) -> tuple[Tensor, Tensor]:
            step = (ends[1] - ends[0]) / self._steps
            return step, (-ends[0] / step).round()

        def error(ends: list[Tensor]) -> float:
            return (self._rounded(some, *grid(ends)) - some).square_().sum().item()

        ends = [values.amin().clamp(max=0), values.amax().clamp(min=0)]
        if not grid(ends)[0] > 0:  # all are zero
            return torch.ones_like(ends[0]), torch.zeros_like(ends[0])
        for side in (1, 0):
            shares = torch.linspace(1, NARROWEST, CANDIDATES).tolist() if ends[side] else []
            narrower = [[*ends[:side], share * ends[side], *ends[side + 1 :]] for share in shares]
            ends = min(narrower, key=error, default=ends)
        return grid(ends)


def _storage(tensor: Tensor) -> int:
    """What a tensor and its slices have in common."""
    return tensor.untyped_storage().data_ptr()
