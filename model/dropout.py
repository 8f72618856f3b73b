"""Dropout whose draws cost next to nothing on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DRAWS = 2**16  # that 16 random bits tell apart


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, drawn on a CPU from 16 bits a value: four values share a draw of 64.

    torch draws a CPU's random numbers one after the other, which is a third of a training step of MicroNet. The
    probability is `p` to the nearest 1/65536, and what is kept is scaled by exactly the inverse of what is kept.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * DRAWS)
        if not self.training or x.device.type != "cpu" or self.inplace or not 0 < dropped < DRAWS:
            return F.dropout(x, self.p, self.training, self.inplace)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        draws = bits.view(torch.int16)[: x.numel()]
        kept = draws.as_strided(x.shape, x.stride()) if _is_dense(x) else draws.view(x.shape)
        scale = DRAWS / (DRAWS - dropped)
        return x * (kept >= dropped - DRAWS // 2).to(x.dtype).mul_(scale)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements lie side by side, in whatever order."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
