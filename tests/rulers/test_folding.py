"""Dead channels: the smaller network that a count assumes is built; it computes and counts the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.tallies import batch_norm, counted, lines, total
from model import build
from model.selection import ternary_candidates
from rulers.challenge import count
from rulers.tally import Widths

WIDTHS = Widths(16, 16, 32)
ONE_BIT = Widths(1, 1, 1)  # all weights are stored dense then


@pytest.fixture(autouse=True)
def double_precision_and_a_seed():
    """So that what is computed in another order is the same to nine digits."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def convolution(channels_in: int, channels_out: int, dead: tuple[int, ...] = (), **options) -> nn.Conv2d:
    """A convolution with random weights, a third of them zero, and the `dead` filters."""
    conv = nn.Conv2d(channels_in, channels_out, **{"kernel_size": 3, "padding": 1, "bias": False} | options)
    conv.weight.data.normal_()
    conv.weight.data[torch.rand_like(conv.weight) < 0.3] = 0
    conv.weight.data[list(dead)] = 0
    return conv


def normalization(channels: int, dead: tuple[int, ...], constant: float) -> nn.BatchNorm2d:
    """A BatchNorm that makes `constant` of the dead channels, which are zero before it."""
    norm = batch_norm(channels)
    scale = norm.weight.data / (norm.running_var + norm.eps).sqrt()
    norm.bias.data[list(dead)] = (constant + norm.running_mean * scale)[list(dead)]
    return norm


def pick(module: nn.Module, outputs: list[int], inputs: list[int] | slice = slice(None)) -> nn.Module:
    """A copy of a layer or BatchNorm with some of its channels only."""
    module = copy.deepcopy(module)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.ndim:
            chosen = tensor.data[outputs]
            if tensor.ndim > 1:
                chosen = chosen[:, inputs]
            owner = module._parameters if name in module._parameters else module._buffers
            owner[name] = nn.Parameter(chosen) if name in module._parameters else chosen
    return module


def same_outputs(one: nn.Module, other: nn.Module, size: int) -> bool:
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        outputs = [copy.deepcopy(network).eval()(images) for network in (one, other)]
    assert outputs[0].std() > 1e-3
    return torch.allclose(*outputs, rtol=0, atol=1e-9)


def same_count(one: nn.Module, other: nn.Module, size: int) -> bool:
    return total(count(one, size, WIDTHS)) == total(count(other, size, WIDTHS))


DEAD, LIVE = (1, 4), [0, 2, 3, 5]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()], ids=str)
def test_channel_that_is_zero_goes_with_its_inputs(activation):
    """A dead filter, a negative bias, ReLU: the next convolution may pad."""
    conv1, norm = convolution(3, 6, DEAD), normalization(6, DEAD, -0.7)
    conv2, norm2 = convolution(6, 4), batch_norm(4)
    network = nn.Sequential(conv1, norm, activation, nn.Dropout(), conv2, norm2)
    smaller = nn.Sequential(
        pick(conv1, LIVE), pick(norm, LIVE), activation, nn.Dropout(), pick(conv2, [0, 1, 2, 3], LIVE), norm2
    )
    assert same_outputs(network, smaller, 7)
    assert same_count(network, smaller, 7)
    assert lines(count(network, 7, WIDTHS))["2"].mults == 4 * 49  # nor are dead channels activated


def test_channel_that_is_not_zero_before_a_padded_convolution_stays():
    """Its border cannot be a bias. The filter is not executed, but its zeros stay in the mask."""
    conv1, norm = convolution(3, 6, DEAD), normalization(6, DEAD, 0.7)
    conv2, norm2 = convolution(6, 4), batch_norm(4)
    network = nn.Sequential(conv1, norm, nn.ReLU(), conv2, norm2)
    found = lines(count(network, 7, WIDTHS))
    nonzero = int(conv1.weight.count_nonzero())
    n = 4 * 49
    assert counted(found["0"]) == (6 * 27 + nonzero * 16 + 6 * 16, nonzero * 49, (nonzero - 4) * 49 + n)
    assert counted(found["2"]) == (0, n, 0)
    nonzero = int(conv2.weight.count_nonzero())
    assert counted(found["3"]) == (4 * 54 + nonzero * 16 + 4 * 16, nonzero * 49, nonzero * 49)

    folded = copy.deepcopy(network)  # as if a bias could stand for it
    folded[4].running_mean -= 0.7 * conv2.weight.data[:, DEAD].sum(dim=(1, 2, 3))
    folded[3].weight.data[:, DEAD] = 0
    assert not same_outputs(network, folded, 7)


@pytest.mark.parametrize("biased", [True, False])
def test_constant_joins_the_bias_of_a_layer_that_does_not_pad(biased):
    conv1, norm = convolution(3, 6, DEAD), normalization(6, DEAD, 0.7)
    conv2 = convolution(6, 4, padding=0, bias=biased)
    network = nn.Sequential(conv1, norm, nn.SiLU(), conv2)
    smaller = nn.Sequential(pick(conv1, LIVE), pick(norm, LIVE), nn.SiLU(), pick(conv2, [0, 1, 2, 3], LIVE))
    if biased:
        constant = F.silu(torch.tensor(0.7))
        smaller[3].bias.data += constant * conv2.weight.data[:, DEAD].sum(dim=(1, 2, 3))
        assert same_outputs(network, smaller, 7)
    assert same_count(network, smaller, 7) == biased  # there is no bias that the constant could join


def test_constant_joins_the_bias_of_the_classifier():
    conv1, norm, linear = convolution(3, 6, DEAD), normalization(6, DEAD, 0.7), nn.Linear(6, 5)
    network = nn.Sequential(conv1, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    smaller_linear = pick(linear, [0, 1, 2, 3, 4], LIVE)
    smaller = nn.Sequential(pick(conv1, LIVE), pick(norm, LIVE), *network[2:5], smaller_linear)
    smaller_linear.bias.data += 0.7 * linear.weight.data[:, DEAD].sum(dim=1)
    assert same_outputs(network, smaller, 7)
    assert same_count(network, smaller, 7)


def test_channel_that_is_not_read_goes():
    """The next convolution has only zeros for it, whatever the constant."""
    conv1, norm, conv2 = convolution(3, 6, DEAD), normalization(6, DEAD, 0.7), convolution(6, 4)
    conv2.weight.data[:, DEAD] = 0
    network = nn.Sequential(conv1, norm, nn.ReLU(), conv2)
    smaller = nn.Sequential(pick(conv1, LIVE), pick(norm, LIVE), nn.ReLU(), pick(conv2, [0, 1, 2, 3], LIVE))
    assert same_outputs(network, smaller, 7)
    assert same_count(network, smaller, 7)


def test_depthwise_filter_without_its_input_is_dead_in_turn():
    """An inverted residual block: expand, depthwise, project."""
    expand, norm1 = convolution(3, 6, DEAD, kernel_size=1, padding=0), normalization(6, DEAD, -1)
    depthwise, norm2 = convolution(6, 6, groups=6), normalization(6, DEAD, 0.4)
    project = convolution(6, 4, kernel_size=1, padding=0, bias=True)
    network = nn.Sequential(expand, norm1, nn.ReLU6(), depthwise, norm2, nn.ReLU6(), project)
    smaller_depthwise = pick(depthwise, LIVE)
    smaller_depthwise.in_channels = smaller_depthwise.out_channels = smaller_depthwise.groups = 4
    smaller = nn.Sequential(
        pick(expand, LIVE), pick(norm1, LIVE), nn.ReLU6(), smaller_depthwise, pick(norm2, LIVE), nn.ReLU6(),
        pick(project, [0, 1, 2, 3], LIVE),
    )  # fmt: skip
    smaller[6].bias.data += 0.4 * project.weight.data[:, DEAD].sum(dim=(1, 2, 3))
    assert same_outputs(network, smaller, 7)
    assert same_count(network, smaller, 7)


def test_channels_stay_at_a_residual_addition_and_at_the_output():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = convolution(3, 3, dead=(1,))
            self.conv2 = convolution(3, 3, dead=(2,))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(x + self.conv1(x))

    network = Residual()
    found = lines(count(network, 7, WIDTHS))
    for name in ("conv1", "conv2"):
        nonzero = int(network.get_submodule(name).weight.count_nonzero())
        assert counted(found[name]) == (81 + nonzero * 16, nonzero * 49, (nonzero - 2) * 49)
    assert found["add"].adds == 3 * 49


def test_channels_stay_where_another_layer_needs_them():
    """The constant 0.7 may go from a layer that does not pad, not from one that does."""

    class Branching(nn.Module):
        def __init__(self, padding: int):
            super().__init__()
            self.conv = convolution(3, 6, DEAD)
            self.norm = normalization(6, DEAD, 0.7)
            self.left = convolution(6, 4, padding=0, bias=True)
            self.right = convolution(6, 4, padding=padding, bias=True)

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.norm(self.conv(x))
            return [self.left(x), self.right(x)]

    def stored(padding: int) -> list[float]:
        found = lines(count(Branching(padding), 7, ONE_BIT))
        return [found[name].bits for name in ("conv", "left", "right")]

    assert stored(padding=0) == [4 * 27 + 4, 4 * 36 + 4, 4 * 36 + 4]
    assert stored(padding=1) == [6 * 27 + 6, 4 * 36 + 4, 4 * 54 + 4]


def test_padding_outside_the_convolution_is_seen():
    """efficientnet_pytorch pads in a module of its own."""
    for constant, bits in ((0.7, 6 * 27 + 6), (-0.7, 4 * 27 + 4)):
        conv1, norm = convolution(3, 6, DEAD), normalization(6, DEAD, constant)
        pad, conv2 = nn.ZeroPad2d(1), convolution(6, 4, padding=0, bias=True)
        network = nn.Sequential(conv1, norm, nn.ReLU(), pad, conv2)
        assert lines(count(network, 7, ONE_BIT))["0"].bits == bits


def test_wholly_dead_network_costs_its_output():
    network = nn.Sequential(convolution(3, 6, tuple(range(6))), nn.ReLU(), convolution(6, 4, bias=True))
    tally = count(network, 7, WIDTHS)
    assert total(tally) == (4 * 16, 0, 0)


def test_filters_that_sum_to_zero_are_not_dead():
    conv = nn.Conv2d(2, 1, 1, bias=False)
    conv.weight.data = torch.tensor([0.5, -0.5]).reshape(1, 2, 1, 1)
    assert total(count(conv, (2, 3, 3), WIDTHS)) == (2 * 16, 18, 9)


@pytest.mark.parametrize("seed", range(3))
def test_ternary_resnet20_without_its_dead_channels(seed):
    """Inside of a block dead channels go, unless their constant is positive: conv2 pads."""
    torch.manual_seed(seed)
    network = build({"name": "resnet20"})
    for name in ternary_candidates(network, "resnet20"):
        weight = network.get_parameter(name).data
        weight.copy_(0.11 * (weight > 0.08) - 0.07 * (weight < -0.08))
        weight[torch.rand(len(weight)) < 0.2] = 0
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            network.set_submodule(name, batch_norm(module.num_features))

    smaller, removed = copy.deepcopy(network), 0
    for block in (*smaller.layer1, *smaller.layer2, *smaller.layer3):
        norm = block.bn1
        constant = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
        dead = (block.conv1.weight == 0).flatten(1).all(dim=1) & (constant <= 0)
        kept = (~dead).nonzero().flatten().tolist()
        removed += int(dead.sum())
        block.conv1, block.bn1 = pick(block.conv1, kept), pick(norm, kept)
        block.conv2 = pick(block.conv2, list(range(block.conv2.out_channels)), kept)
    assert removed > 10
    assert same_outputs(network, smaller, 32)
    assert same_count(network, smaller, 32)
