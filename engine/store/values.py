"""What is kept of a network's values, in the packed file and in the evaluation of what is packed."""

import torch
from torch import Tensor

from model.levels import is_quantized


def stored_values(tensor: Tensor, half_precision: bool = True) -> Tensor:
    """The values that packing keeps of a tensor, in its own type: all of them, or what `half_precision` leaves.

    That rounds float32 and float64 to float16, parameters and buffers alike, but for quantized weights and tensors
    for which float16 is too narrow: the largest magnitude is not in its normal range, 6.1e-5 to 65504 (variances of
    BatchNorm can be large). In all others a value changes by 2**-11 of itself at most, or by 2**-25 where that is
    more: far below the epsilon that BatchNorm adds to variances.
    """
    if not half_precision or tensor.dtype not in (torch.float32, torch.float64) or not tensor.numel():
        return tensor
    half, largest = torch.finfo(torch.float16), tensor.abs().max()
    if not half.tiny <= largest <= half.max or is_quantized(tensor):
        return tensor
    return tensor.half().to(tensor.dtype)
