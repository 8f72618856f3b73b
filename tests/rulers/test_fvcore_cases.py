"""The networks of fvcore's `tests/test_flop_count.py`, for one image: it counts a multiply-add as one operation.

Multiplications agree with its figures everywhere. The differences of convention: additions are counted beside them; a
BatchNorm without factors of its own takes a multiplication and an addition a value in inference (fvcore: one
operation), and group norms take their means and deviations as sums and products (fvcore: 5 operations a value, 4
without factors).
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rulers
from helpers.tallies import total

CONVOLUTIONS = {
    "plain": (nn.Conv2d(10, 3, 3, padding=1), 15, 60_750),
    "strided": (nn.Conv2d(10, 6, 3, stride=2, padding=1), 20, 54_000),
    "grouped": (nn.Conv2d(16, 8, 5, padding=2, groups=4), 15, 180_000),
    "as many groups as filters": (nn.Conv2d(16, 8, 3, padding=1, groups=8), 15, 32_400),
    "1-D": (nn.Conv1d(10, 3, 3, padding=1), 15, 1_350),
    "3-D": (nn.Conv3d(10, 3, 3, padding=1), 15, 2_733_750),
    "transposed": (nn.ConvTranspose2d(10, 3, 3, padding=1), 15, 60_750),
    "transposed, strided": (nn.ConvTranspose2d(10, 3, 3, stride=2, padding=1), 15, 60_750),
    "transposed, padded": (nn.ConvTranspose2d(10, 3, 3, stride=3, padding=1, output_padding=2), 15, 60_750),
}


class Call(nn.Module):
    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def counted(network: nn.Module, shapes) -> tuple[float, float]:
    """Multiplications and additions; nothing is left uncounted."""
    tally = rulers.count(network.eval(), shapes)["challenge"]
    assert not tally.uncounted
    return total(tally)[1:]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    network, side, wanted = CONVOLUTIONS[name]
    shape = (network.in_channels, *[side] * len(network.kernel_size))
    assert counted(network, shape) == (wanted, wanted)  # with the bias, an addition for each


@pytest.mark.parametrize(
    ("function", "shapes", "wanted", "sums"),
    [
        (torch.matmul, [(1, 20, 10), (1, 10, 100)], 20_000, 2_000),
        (torch.matmul, [(2, 2, 20, 10), (2, 2, 10, 100)], 80_000, 8_000),
        (torch.matmul, [(1, 20, 10), (10, 100)], 20_000, 2_000),
        (torch.matmul, [(2, 20, 10), (10, 100)], 40_000, 4_000),
        (torch.mm, [(3, 4), (4, 5)], 60, 15),
        (torch.bmm, [(2, 5, 2), (2, 2, 12)], 240, 120),
        (lambda x, y: torch.einsum("nct,ncp->ntp", x, y), [(1, 5, 2), (1, 5, 12)], 120, 24),
        (lambda x, y: torch.einsum("ntg,ncg->nct", x, y), [(1, 2, 6), (1, 5, 6)], 60, 10),
        (lambda x, y: torch.einsum("nc,nchw->hw", x, y), [(3, 4), (3, 4, 2, 3)], 72, 6),
    ],
)
def test_products(function, shapes, wanted, sums):
    """A sum of n products takes n - 1 additions."""
    assert counted(Call(function), [torch.randn(shape) for shape in shapes]) == (wanted, wanted - sums)


@pytest.mark.parametrize(("shape", "wanted"), [((1, 10), 200), ((1, 5, 10), 1_000)])
def test_linear_layers(shape, wanted):
    assert counted(nn.Linear(10, 20), [torch.randn(shape)]) == (wanted, wanted)


def test_a_convolution_and_two_linear_layers():
    network = nn.Sequential(
        *(nn.Conv2d(2, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3), nn.Linear(3, 1))
    )
    tally = rulers.count(network, (2, 10, 10))["challenge"]
    mults = {group.name: group.total("mults") for group in tally.groups}
    assert (mults["convolutions"], mults["linear layers"]) == (1_000, 18)


@pytest.mark.parametrize(
    ("network", "shape", "wanted"),
    [
        (nn.BatchNorm2d(2), (2, 2, 2), (8, 8)),  # fvcore: 16 operations
        (nn.BatchNorm1d(10, affine=False), (10,), (10, 10)),  # fvcore: 10
        (nn.GroupNorm(2, 2), (2, 2, 2), (30, 30)),  # fvcore: 40
        (nn.GroupNorm(2, 2, affine=False), (2, 2, 2), (22, 22)),  # fvcore: 32
        (Call(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")), (2, 2, 2), (128, 96)),  # fvcore: 128
    ],
)
def test_norms_and_resampling(network, shape, wanted):
    assert counted(network, shape) == wanted
