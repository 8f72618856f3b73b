"""The forms of EfficientNet."""

from collections.abc import Callable

from torch import nn

from rulers.published.terms import (
    SIGMOID,
    SWISH,
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

# A layer and its `div`.
Placed = tuple[Layer, float]

# The layers of a block with the BatchNorm behind each; squeeze and excitation has biases instead.
_BLOCK_LAYERS = {
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_se_reduce": None,
    "_se_expand": None,
    "_project_conv": "_bn2",
}


def efficientnet(network: nn.Module, size: int, b: int) -> tuple[list[Group], int]:
    """EfficientNet's eight groups and, as a ninth, its skip additions; and `params`."""
    stem = Layer("_conv_stem", network._conv_stem, (network._bn0,))
    head = Layer("_conv_head", network._conv_head, (network._bn1,))
    classifier = Layer("_fc", network._fc)
    parts, skips = _block_layers(network)

    def lines(form: Callable[[Layer, float, int, int], Line], kind: str) -> list[Line]:
        return [form(layer, div, size, b) for layer, div in parts[kind]]

    groups = [
        Group("stem", [_stem(stem, size, b)]),
        Group("expand", lines(_expand, "_expand_conv")),
        Group("depthwise", lines(_depthwise, "_depthwise_conv")),
        Group("SE reduce", lines(_se_reduce, "_se_reduce")),
        Group("SE expand", lines(_se_expand, "_se_expand")),
        Group("project", lines(_project, "_project_conv")),
        Group("head", [_head(head, size, b)]),
        Group("fully connected", [_convolution(classifier, classifier.channels_out, b)]),
        Group("skip additions", [_skip(layer, div, size) for layer, div in skips]),
    ]
    layers = [stem, *(layer for kind in parts.values() for layer, _ in kind), head, classifier]
    return groups, sum(layer.merged_params for layer in layers)


def _block_layers(network: nn.Module) -> tuple[dict[str, list[Placed]], list[Placed]]:
    """The blocks' layers by kind, and the project convolutions that a skip addition follows.

    Quirk: `div` is halved already at a block with stride 2, for its expand and depthwise convolutions too
    early. (Blocks 2, 5, 8 and 16 of B1 and B2; 2, 5, 8, 18 of B3; 2, 6, 10, 22 of B4.)
    """
    parts = {kind: [] for kind in _BLOCK_LAYERS}
    skips = []
    div = 1 / 2
    for i, block in enumerate(network._blocks):
        stride = block._depthwise_conv.stride[0]
        div /= stride
        for kind, norm in _BLOCK_LAYERS.items():
            if hasattr(block, kind):  # the first blocks do not expand
                norms = (getattr(block, norm),) if norm else ()
                parts[kind].append((Layer(f"_blocks.{i}.{kind}", getattr(block, kind), norms), div))
        first = getattr(block, "_expand_conv", block._depthwise_conv)
        if stride == 1 and first.in_channels == block._project_conv.out_channels:
            skips.append(parts["_project_conv"][-1])
    return parts, skips


def _outputs(layer: Layer, div: float, size: int) -> int:
    """Height and width of the layer's output. Quirk: the padding counts as 0.

    Below 160 pixels the last blocks' 5x5 kernels do not fit any more, and the form means nothing there.
    """
    stride = layer.module.stride[0]
    return out_size(size, div, layer.kernel, stride, padding=0)


def _convolution(layer: Layer, n: int, b: int, ternary: bool = False) -> Line:
    """A convolution with `n` outputs, or the classifier, with a bias or a merged BatchNorm."""
    numel, nonzero = layer.weight.numel(), count_nonzero(layer.weight)
    v = nonzero / layer.channels_out
    note = stored_as(layer.weight, numel, nonzero, ternary)
    return layer.line(
        note,
        bits=weight_bits(note, numel, nonzero, b) + layer.channels_out * b,
        mults=weight_mults(note, v, n),
        adds=(v - 1) * n + n,
    )


def _stem(layer: Layer, size: int, b: int) -> Line:
    n = _outputs(layer, 1, size) ** 2 * layer.channels_out
    return activated(_convolution(layer, n, b), SWISH, n)


def _expand(layer: Layer, div: float, size: int, b: int) -> Line:
    n = _outputs(layer, div, size) ** 2 * layer.channels_out
    return activated(_convolution(layer, n, b, ternary=True), SWISH, n)


def _depthwise(layer: Layer, div: float, size: int, b: int) -> Line:
    n = _outputs(layer, div, size) ** 2 * layer.channels_out
    return activated(_convolution(layer, n, b), SWISH, n)


def _se_reduce(layer: Layer, div: float, size: int, b: int) -> Line:
    """Average pool, 1x1 convolution of one pixel, swish."""
    n = layer.channels_out
    line = activated(_convolution(layer, n, b), SWISH, n)
    return pooled(line, _outputs(layer, div, size), layer.channels_in)


def _se_expand(layer: Layer, div: float, size: int, b: int) -> Line:
    """1x1 convolution of one pixel, sigmoid, and the multiplication of every channel by the result."""
    n = layer.channels_out
    line = activated(_convolution(layer, n, b), SIGMOID, n)
    line.mults += _outputs(layer, div, size) ** 2 * layer.channels_out
    return line


def _project(layer: Layer, div: float, size: int, b: int) -> Line:
    n = _outputs(layer, div, size) ** 2 * layer.channels_out
    return _convolution(layer, n, b, ternary=True)


def _head(layer: Layer, size: int, b: int) -> Line:
    """1x1 convolution, swish, average pool."""
    out = _outputs(layer, 1 / 32, size)
    n = out**2 * layer.channels_out
    line = activated(_convolution(layer, n, b, ternary=True), SWISH, n)
    return pooled(line, out, layer.channels_out)


def _skip(project: Layer, div: float, size: int) -> Line:
    """The addition after a project convolution.

    Quirk: the size is multiplied by `div` twice and not rounded, so that far too few elements count.
    """
    block = project.name.removesuffix("._project_conv")
    return Line(block, adds=(size * div * div) ** 2 * project.channels_out)
