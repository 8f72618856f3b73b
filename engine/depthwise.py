"""Depthwise convolutions that CPUs train slowly in bfloat16."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class DepthwiseIn32Bit(TorchFunctionMode):
    """A context within bfloat16 autocast on a CPU, in which training computes some depthwise convolutions in 32 bit.

    Those with strides, dilation, kernels above 3x3, or several outputs a channel. oneDNN has no fast bfloat16 code for
    their gradients: forward and backward take 1.3 to 11 times as long as in 32 bit with its casts
    (benchmarks/README.md). The output is bfloat16, as without this context.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return (_conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def _conv2d(  # noqa: PLR0913, the signature is torch's
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if not (torch.is_grad_enabled() and _is_slow(weight, stride, dilation, groups)):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    with torch.autocast("cpu", enabled=False):
        bias = bias if bias is None else bias.float()
        output = torch.conv2d(input.float(), weight.float(), bias, stride, padding, dilation, groups)
    return output.bfloat16()


def _is_slow(weight: Tensor, stride: Any, dilation: Any, groups: int) -> bool:
    outputs, inputs, *kernel = weight.shape
    if inputs > 1 or groups == 1:
        return False
    return outputs > groups or max(kernel) > 3 or max(_largest(stride), _largest(dilation)) > 1


def _largest(steps: Any) -> int:
    return int(steps) if isinstance(steps, int) else max(steps)
