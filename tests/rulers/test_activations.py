"""Activations of few bits: how they are counted, and that evaluation rounds them so."""

import torch
from torch import Tensor, nn

from engine.activations import QuantizedActivations
from helpers.tallies import lines
from rulers.challenge import count
from rulers.tally import Widths


class Seen(nn.Module):
    """A convolution and h-swish that note what they read."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish()
        self.head = nn.Linear(8, 5)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))


def levels_read(network: nn.Module, images: Tensor, bits: int) -> list[int]:
    """How many distinct values each multiplying operation reads, weights aside."""
    quantized, seen = QuantizedActivations(network.eval(), bits), []
    original = quantized._mode._rounded

    def noted(value: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        rounded = original(value, step, zero)
        seen.append(len(rounded.unique()))
        return rounded

    quantized(images)  # decides the ranges
    quantized._mode._rounded = noted
    quantized(images)
    return seen


def test_whatever_is_multiplied_has_few_levels():
    torch.manual_seed(0)
    seen = levels_read(Seen(), torch.randn(4, 3, 8, 8), bits=3)
    assert len(seen) == 4  # what the convolution, h-swish, the mean and the linear layer read
    assert max(seen) <= 8 and min(seen) > 2


def test_many_bits_change_little_and_the_network_nothing():
    torch.manual_seed(0)
    network, images = Seen().eval(), torch.randn(16, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        exact = network(images)
    errors = [(QuantizedActivations(network, bits)(images) - exact).abs().max().item() for bits in (16, 8, 4)]
    assert errors[0] < 1e-3 < errors[1] < errors[2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_later_batches_have_the_ranges_of_the_first():
    torch.manual_seed(0)
    network = QuantizedActivations(nn.Sequential(nn.Conv2d(1, 1, 1, bias=False)).eval(), 2)
    weight = network.network[0].weight.item()
    network(torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 2, 2))
    assert torch.allclose(network(torch.tensor([0.2, 0.9, 7.0, -5.0]).view(1, 1, 2, 2)).flatten() / weight,
                          torch.tensor([0.0, 1.0, 3.0, 0.0]))  # fmt: skip


def test_activations_in_place_are_rounded_too():
    torch.manual_seed(0)
    seen = levels_read(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)), torch.randn(2, 3, 4, 4), bits=2)
    assert len(seen) == 2 and max(seen) <= 4


def test_multiplications_count_at_the_wider_of_activation_and_weight():
    """Of a dense layer at 16 bit, of one of 4 bit at the activations' 8, of h-swish likewise."""
    torch.manual_seed(0)
    network = Seen()
    network.head.weight.data = torch.randint(-7, 8, (5, 8)) * 0.25
    network.head.weight.data[0, 0] = 7 * 0.25
    tally = count(network, 8, Widths(16, 16, 32, act=8))
    width = {name: line.mult_bits / line.mults for name, line in lines(tally).items() if line.mults}
    assert width == {"conv": 16, "act": 8, "mean": 8, "head": 8}
    stated = count(network, 8, Widths(16, 16, 32))
    saved = sum(line.mults * 8 for name, line in lines(stated).items() if name != "conv")
    assert round((stated.total_mflop - tally.total_mflop) * 32e6) == saved


def test_attention_rounds_what_it_reads_and_not_its_stored_weights():
    """Query, key and value read slices of one stored weight; torch's fast path would round nothing."""
    torch.manual_seed(0)
    network, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)
    seen = levels_read(network, x, bits=3)
    assert len(seen) >= 8 and max(seen) <= 8
    with torch.no_grad():
        assert not torch.equal(QuantizedActivations(network, 3)(x), network(x))
    read = []
    quantized = QuantizedActivations(nn.MultiheadAttention(8, 2, batch_first=True).eval(), 8)
    original = quantized._mode._rounded
    quantized._mode._rounded = lambda value, *grid: (read.append(tuple(value.shape)), original(value, *grid))[1]
    shapes = {(8, 8), (24, 8), (8, 24)}
    with torch.no_grad(), quantized._mode:
        quantized.network(x, x + 1, x + 2)
    assert read and not shapes & set(read)
