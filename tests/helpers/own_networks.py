"""Networks made of a function, and what a tally counts of them."""

import torch
from torch import Tensor, nn

from rulers.tally import Tally, Widths

FULL = Widths(32, 32, 32)
ONE_BIT = Widths(1, 1, 1)
PRODUCTS = ("convolutions", "linear layers")


class Net(nn.Module):
    """The modules and tensors that are given, and a forward function of them and of the input."""

    def __init__(self, forward, **members):
        super().__init__()
        self.function = forward
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def values(tally: Tally) -> float:
    """Stored values of 32 bit."""
    return sum(group.total("bits") for group in tally.groups) / 32


def mults(tally: Tally, *groups: str) -> float:
    return sum(group.total("mults") for group in tally.groups if not groups or group.name in groups)
