"""Depthwise convolutions that train in 32 bit where all else is bfloat16, on CPUs."""

import pytest
import torch
from torch import nn

from engine.device import Machine

BF16 = Machine(torch.device("cpu"), amp="bf16")
IMAGES = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(0))


def trained(layer, context):
    """The output of `layer` on IMAGES within `context`, and the gradient of its weight."""
    with context:
        output = layer(IMAGES)
    layer.weight.grad = None
    output.square().sum().backward()
    return output, layer.weight.grad


def conv(out=6, kernel=3, groups=6, **others):
    torch.manual_seed(1)
    return nn.Conv2d(6, out, kernel, padding=2, groups=groups, **others)


@pytest.mark.parametrize(
    "layer",
    [
        conv(stride=2),
        conv(stride=(1, 2), bias=False),
        conv(kernel=5),
        conv(kernel=(1, 5)),
        conv(kernel=1, stride=2),
        conv(dilation=2),
        conv(out=12),
    ],
    ids=lambda layer: layer.extra_repr(),
)
def test_slow_ones_train_in_32_bit_and_give_bfloat16(layer):
    output, gradient = trained(layer, BF16.autocast())
    exact = layer(IMAGES).bfloat16()
    exact_gradient = torch.autograd.grad(exact.square().sum(), layer.weight)[0]
    assert output.dtype == torch.bfloat16 and torch.equal(output, exact)
    assert torch.equal(gradient, exact_gradient)
    assert not torch.equal(output, trained(layer, torch.autocast("cpu", torch.bfloat16))[0])


@pytest.mark.parametrize(
    "layer",
    [conv(), conv(kernel=1), conv(groups=3, stride=2), conv(groups=1, stride=2), conv(groups=1, kernel=5)],
    ids=lambda layer: layer.extra_repr(),
)
def test_others_train_in_bfloat16(layer):
    output, gradient = trained(layer, BF16.autocast())
    plain, plain_gradient = trained(layer, torch.autocast("cpu", torch.bfloat16))
    assert torch.equal(output, plain) and torch.equal(gradient, plain_gradient)


def test_without_gradients_all_are_bfloat16():
    layer = conv(stride=2)
    with torch.no_grad():
        with BF16.autocast():
            output = layer(IMAGES)
        with torch.autocast("cpu", torch.bfloat16):
            plain = layer(IMAGES)
    assert torch.equal(output, plain)


def test_the_context_ends_with_the_pass():
    layer = conv(stride=2)
    with pytest.raises(ZeroDivisionError), BF16.autocast():
        raise ZeroDivisionError
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(IMAGES)
    assert not torch.equal(plain, layer(IMAGES).bfloat16())


def test_a_compiled_network_trains_alike():
    network = nn.Sequential(conv(stride=2), nn.ReLU())
    compiled = torch.compile(network, backend="eager")
    with BF16.autocast():
        assert torch.equal(compiled(IMAGES), network(IMAGES))
