"""The forms of MicroNet, and of ResNet-20 read as one."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rulers.published.terms import (
    RELU,
    Layer,
    activated,
    count_nonzero,
    out_size,
    pooled,
    stored_as,
    weight_bits,
    weight_mults,
)
from rulers.tally import Group, Line

# (biases, multiplications, additions) that stand beside a convolution, from its index, n, live_in, live_out.
Extras = Callable[[int, int, int, int], tuple[int, int, int]]


def micronet(network: nn.Module, size: int, b: int) -> tuple[list[Group], int]:
    """Groups and `params` of MicroNet."""
    shortcuts, ternary = [], []
    for name, block in _blocks(network):
        ternary.append(Layer(f"{name}.conv1", block.conv1, (block.bn1, block.bn2)))
        ternary.append(Layer(f"{name}.conv2", block.conv2, (block.bn3,)))
        if len(block.shortcut):
            shortcuts.append(Layer(f"{name}.shortcut.0", block.shortcut[0], (block.shortcut[1],)))
    return _residual_groups(network, shortcuts, ternary, size, b, _micronet_extras, last=RELU)


def resnet(network: nn.Module, size: int, b: int) -> tuple[list[Group], int]:
    """Groups and `params` of ResNet-20 by MicroNet's forms; our reading, the 2019 programs did not score it.

    Its shortcuts have no weights, and its last ReLU is already one of `_resnet_extras`.
    """
    ternary = []
    for name, block in _blocks(network):
        ternary.append(Layer(f"{name}.conv1", block.conv1, (block.bn1,)))
        ternary.append(Layer(f"{name}.conv2", block.conv2, (block.bn2,)))
    return _residual_groups(network, [], ternary, size, b, _resnet_extras, last=(0, 0))


def _blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The residual blocks with their names, `layer1.0` and so on, in the network's order."""
    return [
        (f"{stage}.{i}", block)
        for stage, blocks in network.named_children()
        if isinstance(blocks, nn.Sequential)
        for i, block in blocks.named_children()
    ]


def _residual_groups(
    network: nn.Module,
    shortcuts: list[Layer],
    ternary: list[Layer],
    size: int,
    b: int,
    extras: Extras,
    last: tuple[int, int],
) -> tuple[list[Group], int]:
    """MicroNet's four groups and `params`; `extras` and `last` are for `_ternary_convs`."""
    first = Layer("conv1", network.conv1, (network.bn1,))
    classifier = Layer("linear", network.linear)
    groups = [
        Group("first conv", [_first_conv(first, size, b)]),
        Group("shortcuts", [_shortcut(layer, i, size, b) for i, layer in enumerate(shortcuts)]),
        Group("ternary convs", _ternary_convs(ternary, size, b, extras, last)),
        Group("fully connected", [_classifier(classifier, b)]),
    ]
    params = sum(layer.merged_params for layer in (first, *shortcuts, classifier))
    return groups, params + int(groups[2].total("numel"))


def _first_conv(layer: Layer, size: int, b: int) -> Line:
    """Convolution with stride 1, BatchNorm merged, and ReLU."""
    n = size**2 * layer.channels_out
    v = layer.kernel**2 * layer.channels_in
    return activated(layer.line("dense", layer.merged_params * b, v * n, (v - 1) * n + n), RELU, n)


def _shortcut(layer: Layer, i: int, size: int, b: int) -> Line:
    """The `i`-th shortcut, a 1x1 convolution with merged BatchNorm.

    Quirk: its stride counts as 2 always, though it is 1 between some stages of the ImageNet network.
    """
    n = out_size(size, 1 / 2**i, kernel=1, stride=2, padding=0) ** 2 * layer.channels_out
    v = layer.channels_in
    return layer.line("dense", layer.merged_params * b, v * n, (v - 1) * n + n)


def _ternary_convs(layers: list[Layer], size: int, b: int, extras: Extras, last: tuple[int, int]) -> list[Line]:
    """The convolutions inside the blocks, and after them the `last` activation and the average pool.

    What costs is a convolution's live block, its weights without the dead filters and without the inputs that
    were dead filters of the convolution before. `extras` gives what BatchNorms and activations add.

    Quirk: residual additions are not counted. Quirk: multiplying by the scale of a BatchNorm that stands
    before a convolution is not counted, only its bias.
    """
    lines = []
    div = 1.0
    dead = torch.zeros(layers[0].channels_in, dtype=torch.bool, device=layers[0].weight.device)
    for i, layer in enumerate(layers):
        # Quirk: where channels change, the stride counts as 2, though it is 1 between some stages of the
        # ImageNet network. Quirk: the input is already taken at half its size there, so that the first
        # convolution of a stage counts about a quarter of its outputs.
        stride = 1 if layer.channels_in == layer.channels_out else 2
        div /= stride
        out = out_size(size, div, layer.kernel, stride, padding=layer.kernel // 2)

        # Quirk: an input channel goes with the filter that was dead in the convolution before, although the
        # shortcut and the BatchNorm's bias may still feed it.
        dead_in, dead = dead, _dead_filters(layer.weight)
        nonzero_of_pair = (layer.weight != 0).sum(dim=(2, 3))  # [c_out, c_in]
        nonzero = int(nonzero_of_pair[~dead][:, ~dead_in].sum())
        live_in, live_out = count_nonzero(~dead_in), count_nonzero(~dead)
        numel = layer.kernel**2 * live_in * live_out

        n = out**2 * live_out
        v = nonzero / max(live_out, 1)
        note = stored_as(layer.weight, numel, nonzero, ternary=True)
        biases, mults, adds = extras(i, n, live_in, live_out)
        lines.append(
            layer.line(
                note,
                bits=weight_bits(note, numel, nonzero, b) + biases * b,
                mults=weight_mults(note, v, n) + mults,
                adds=(v - 1) * n + adds,
            )
        )
    pool = pooled(Line("average pool"), math.ceil(size * div), live_out)
    return [*lines, activated(pool, last, n)]


def _dead_filters(weight: Tensor) -> Tensor:
    """Which filters of [c_out, c_in, k, k] are dead, as [c_out] booleans.

    Quirk: dead are filters whose values sum to zero, also if they are not all zero. In float64 a filter with
    as many weights of w as of -w does, whatever their order.
    """
    return weight.sum(dim=(1, 2, 3), dtype=torch.float64) == 0


def _micronet_extras(i: int, n: int, live_in: int, live_out: int) -> tuple[int, int, int]:
    """Extras of MicroNet's block: BatchNorm, even conv, BatchNorm, ReLU, odd conv, BatchNorm."""
    if i % 2 == 0:
        return live_in + live_out, n, n
    return live_out, 0, 2 * n


def _resnet_extras(i: int, n: int, live_in: int, live_out: int) -> tuple[int, int, int]:
    """Extras of ResNet-20's block, as we read it: a merged BatchNorm and a ReLU after every convolution."""
    return live_out, n, n


def _classifier(layer: Layer, b: int) -> Line:
    """The fully connected layer with its bias, stored dense."""
    products = layer.weight.numel()
    return layer.line("dense", layer.merged_params * b, products, products)
