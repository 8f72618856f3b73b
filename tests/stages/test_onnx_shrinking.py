"""`--shrink`: dead channels leave the ONNX graph, and what it computes stays the same."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn
from torchvision.models import mobilenet_v3_small

from model_scoring.onnx_file import OnnxNetwork, exported
from model_scoring.onnx_shrinking import shrink


class Residual(nn.Module):
    """A padded convolution, one that isn't padded, and a sum with what both began with."""

    def __init__(self, channels: int, activation: nn.Module, bias: bool):
        super().__init__()
        self.a = nn.Conv2d(3, channels, 3, padding=1, bias=bias)
        self.b = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=bias)
        self.c = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels, bias=bias)
        self.d = nn.Conv2d(2 * channels, channels, 1, bias=bias)
        self.e = nn.Linear(channels, 5, bias=bias)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.activation = activation
        nn.init.normal_(self.norm.bias)

    def forward(self, images):
        x = self.activation(self.a(images))
        y = self.activation(self.c(self.activation(self.norm(self.b(x)))))
        return self.e((x + self.d(y)).mean((2, 3)))


def kill(network: nn.Module, share: float, seed: int) -> None:
    """Set filters, and what is read of channels, to zero."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                weight = module.weight
                for axis in (0, 1):
                    dead = torch.rand(weight.shape[axis], generator=drawn) < share
                    weight.movedim(axis, 0)[dead] = 0
                    if axis == 0 and module.bias is not None:
                        module.bias[dead & (torch.rand(len(dead), generator=drawn) < 0.5)] = 0


def compare(network: nn.Module, size: int, multiple: int = 1) -> tuple[int, int, onnx.ModelProto]:
    """Shrink a network's graph; the counts and the graph, once its outputs are found to be the same."""
    model = exported(network.eval(), [torch.zeros(3, size, size)], 18)
    images = torch.randn(2, 3, size, size)
    before = OnnxNetwork(model.SerializeToString())(images)
    weights = {name: p.detach().numpy().copy() for name, p in network.named_parameters()}
    removed, number = shrink(model, weights, multiple)
    onnx.checker.check_model(model, full_check=True)
    after = OnnxNetwork(model.SerializeToString())(images)
    assert torch.allclose(before, after, atol=1e-4 * max(1, before.abs().max().item()))
    return removed, number, model


@settings(max_examples=4)
@given(
    st.integers(0, 2**31),
    st.integers(2, 6),
    st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    st.sampled_from([nn.ReLU(), nn.Hardswish(), nn.Sigmoid(), nn.ReLU6()]),
    st.booleans(),
)
def test_the_outputs_stay_the_same(seed, channels, share, activation, bias):
    torch.manual_seed(seed)
    network = Residual(channels, activation, bias)
    kill(network, share, seed)
    removed, number, _ = compare(network, 6)
    assert number == 3 * channels and removed <= number - 2
    if share == 0:
        assert not removed


@pytest.mark.parametrize(("dead", "removed"), [(7, 0), (8, 8), (13, 8), (24, 16)])
def test_multiples_of_eight_stay(dead, removed):
    network = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 1), nn.Flatten())
    with torch.no_grad():
        network[0].weight[:dead] = 0
    assert compare(network, 4, multiple=8)[:2] == (removed, 24)


def test_what_nobody_reads_and_what_is_always_zero_is_removed():
    torch.manual_seed(0)
    network = Residual(8, nn.ReLU(), bias=False)
    with torch.no_grad():
        network.a.weight[:2] = network.d.weight[:2] = 0  # nothing comes to the sum in these
        network.b.weight[:4] = 0  # BatchNorm's shifts: the first two are below 0, the others reach a padded reader
        network.norm.bias[:4] = torch.tensor([-1.0, -1, 1, 1])
        network.d.weight[:, 10:] = 0  # not read
    removed, number, model = compare(network, 6)
    assert (removed, number) == (2 + 2 + 6, 24)
    shapes = {each.name: list(each.dims) for each in model.graph.initializer}
    assert shapes["b.weight"] == [8, 6, 3, 3] and shapes["c.weight"] == [8, 1, 3, 3] and shapes["e.weight"] == [5, 6]


def test_a_constant_joins_the_bias_of_a_reader_that_pads_nothing():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Hardswish(), nn.Conv2d(4, 5, 1), nn.Flatten())
    with torch.no_grad():
        network[0].weight[1] = 0
        network[0].bias[1] = 2
    removed, _, model = compare(network, 4)
    assert removed == 1
    (bias,) = (numpy_helper.to_array(each) for each in model.graph.initializer if each.name.startswith("2.bias"))
    gone = network[2].weight[:, 1, 0, 0] * nn.functional.hardswish(torch.tensor(2.0))
    assert np.allclose(bias, (network[2].bias + gone).detach(), atol=1e-6)


class Scalars(nn.Module):
    """Values without channels, and such whose channels an unknown operation moves."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.LayerNorm(8)

    def forward(self, images):
        x = self.norm(self.conv(images).permute(0, 2, 3, 1))
        return (x.mean((1, 2, 3)) * 2 + 1)[:, None]


def test_values_without_channels_and_unknown_operations_stay():
    assert compare(Scalars(), 4)[:2] == (0, 0)


def test_a_network_with_gates_and_sums_loses_a_share_of_its_channels():
    torch.manual_seed(0)
    network = mobilenet_v3_small(num_classes=10)
    kill(network, 0.2, 0)
    removed, number, _ = compare(network, 32)
    assert removed > 0.2 * number
