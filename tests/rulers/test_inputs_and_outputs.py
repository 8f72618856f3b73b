"""Whatever a network takes and returns, it is counted."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from helpers.own_networks import FULL, ONE_BIT, PRODUCTS, Net, mults, values
from rulers.challenge import count


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------- inputs and outputs

Pair = namedtuple("Pair", "first second")


@dataclass
class Result:
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, [y]),
        lambda y: {"out": y},
        lambda y: Pair(y, y),
        Result,
        lambda y: None,
    ],
)
def test_any_output(wrap):
    conv = nn.Conv2d(3, 4, 3)
    conv.weight.data[1] = 0
    tally = count(Net(lambda net, x: wrap(net.conv(x)), conv=conv), 5, ONE_BIT)
    assert values(tally) * 32 == 108 + 4  # whoever reads the dead channel: it stays


@pytest.mark.parametrize(
    ("shapes", "forward"),
    [
        ([(4, 8), (8, 3)], lambda net, x, y: x @ y),
        ([(4, 8), torch.zeros(1, 8, 3)], lambda net, x, y: x @ y),
        ((4, 8), lambda net, x: x @ x.transpose(1, 2)),
    ],
)
def test_several_inputs_and_products_of_features(shapes, forward):
    tally = count(Net(forward), shapes, FULL)
    n = 12 if len(shapes[1:]) and not isinstance(shapes[0], int) else 16
    assert (mults(tally), values(tally)) == (n * 8, 0)


def test_token_ids_one_channel_and_bf16():
    tally = count(nn.Embedding(50, 8), torch.zeros(1, 7, dtype=torch.int64), FULL)
    assert (values(tally), mults(tally)) == (400, 0)
    assert mults(count(nn.Conv2d(1, 4, 3), (1, 28, 20), FULL)) == 36 * 26 * 18
    tally = count(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2)).bfloat16(), 5, FULL
    )
    assert (mults(tally), values(tally)) == (27 * 36 + 72, 112 + 74)


def test_lazy_modules():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    tally = count(net, 5, FULL)
    assert (mults(tally, *PRODUCTS), values(tally), tally.params) == (27 * 36 + 72, 112 + 74, 186)
    assert isinstance(net[0], nn.LazyConv2d) and net[0].has_uninitialized_params()


def test_a_network_without_values_is_refused():
    with pytest.raises(ValueError, match="meta device"):
        count(nn.Conv2d(3, 4, 3, device="meta"), 5, FULL)
