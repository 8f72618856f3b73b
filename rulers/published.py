"""The `published` ruler: the closed forms that the EC2T authors counted with in 2019.

Marban et al., "Learning Sparse & Ternary Neural Networks with Entropy-Constrained Trained Ternarization
(EC2T)", arXiv:2004.01077, entry to the MicroNet Challenge at NeurIPS 2019. Its scores, 0.0242 for CIFAR-100
and 0.5821 for ImageNet, can be compared on this ruler only.

The forms are kept as they were used. Where they depart from what the network does, the comment or docstring
says `Quirk`. Letters, everywhere in this file:

    size    height and width of the input image in pixels (S)
    div     resolution of a layer's input relative to the image, as the forms assume it
    out     height and width of a layer's output
    n       number of a layer's outputs, out * out * channels
    v       values that an output sums over that are not zero, averaged over the filters: the form
            k*k*c_in * nonzero / numel, which is nonzero / c_out
    b       bits of a stored value

Two extensions are ours. A layer that the forms take to be ternary but that is not (of a full-precision or a
pruned network) counts as EfficientNet's other layers do, so that one ruler gives the size before and after:
`nonzero` values of b bits, a 1-bit mask if some weight is zero, and v multiplications an output. And
ResNet-20, which the 2019 programs did not score, is read as a MicroNet without shortcut convolutions and
without a BatchNorm before its convolutions; see `_resnet_extras`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import ROWS, row_of
from model.selection import is_ternary
from rulers.tally import Group, Line, Tally, Widths
from rulers.threads import one_thread

# (biases, multiplications, additions) that stand beside a convolution, from its index, n, live_in, live_out.
Extras = Callable[[int, int, int, int], tuple[int, int, int]]

# Operations per element as (multiplications, additions), by the rules of the challenge.
RELU, SWISH, SIGMOID = (1, 0), (3, 1), (2, 1)


def count(network: nn.Module, model: str, image_size: int, widths: Widths) -> Tally:
    """Count `network`, built as `model`, for images of `image_size` x `image_size` pixels.

    Every parameter of the network, BatchNorms included, belongs to exactly one line of the tally, in `numel`
    and `nonzero`. `params`, the published "Total number of network params", is smaller: see
    `Layer.merged_params`.
    """
    form = FORMS[row_of(model).family]
    with one_thread():
        groups, params = form(network, image_size, widths.value)
    return Tally("published", widths, groups, params, truncate=True)


def prune_depthwise(network: nn.Module, threshold: float) -> None:
    """Set depthwise weights smaller than `threshold` times their layer's largest to zero, in place.

    This is `--prune-threshold`, magnitudes are meant. A threshold of 1 means no pruning.
    """
    if threshold == 1:
        return
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            magnitude = module.weight.detach().abs()
            module.weight.detach()[magnitude < threshold * magnitude.max()] = 0


@dataclass(frozen=True)
class Layer:
    """A convolution or the classifier, with the BatchNorms that a closed form counts with it."""

    name: str
    module: nn.Conv2d | nn.Linear
    norms: tuple[nn.BatchNorm2d, ...] = ()

    @property
    def weight(self) -> Tensor:
        """[c_out, c_in, k, k] of a convolution, c_in = 1 if depthwise; [c_out, c_in] of the classifier."""
        return self.module.weight.detach()

    @property
    def channels_out(self) -> int:
        return self.weight.shape[0]

    @property
    def channels_in(self) -> int:
        return self.weight.shape[1]

    @property
    def kernel(self) -> int:
        return self.weight.shape[-1]

    @property
    def merged_params(self) -> int:
        """Parameters once BatchNorm is merged: the weights and a bias per output channel.

        Quirk: `params` counts so for EfficientNet, and for MicroNet but for its ternary convolutions, whose
        BatchNorms count in full. It is therefore smaller than the number of the network's parameters.
        """
        return self.weight.numel() + self.channels_out

    def line(self, note: str, bits: float, mults: float, adds: float) -> Line:
        """The layer's line, with all parameters of its modules."""
        parameters = [p for module in (self.module, *self.norms) for p in module.parameters()]
        numel = sum(p.numel() for p in parameters)
        nonzero = sum(_count_nonzero(p) for p in parameters)
        return Line(self.name, bits, mults, adds, numel, nonzero, note)


# ---------------------------------------------------------------------------------------- shared terms


def _count_nonzero(tensor: Tensor) -> int:
    return int(torch.count_nonzero(tensor))


def _out(size: int, div: float, kernel: int, stride: int, padding: int) -> int:
    """Height and width of the output of a convolution whose input has size * div.

    Quirk: the quotient is rounded up, where a convolution rounds down.
    """
    return math.ceil((math.ceil(size * div) + 2 * padding - kernel) / stride + 1)


def _note(weight: Tensor, numel: int, nonzero: int, ternary: bool) -> str:
    """How a layer's weights, `nonzero` of `numel`, are stored; `ternary` is what the form assumes."""
    if ternary and is_ternary(weight):
        return "ternary"
    return "sparse" if nonzero < numel else "dense"


def _bits(note: str, numel: int, nonzero: int, b: int) -> int:
    """Bits of weights: two masks and two values if ternary, else the values and, if sparse, one mask."""
    if note == "ternary":
        return 2 * numel + 2 * b
    return nonzero * b + (numel if note == "sparse" else 0)


def _mults(note: str, v: float, n: int) -> float:
    """Multiplications of `n` outputs: by the two values if ternary, else by the values that are not zero."""
    return 2 * n if note == "ternary" else v * n


def _activated(line: Line, activation: tuple[int, int], n: int) -> Line:
    """Add the operations of `activation` on `n` elements to `line`."""
    line.mults += activation[0] * n
    line.adds += activation[1] * n
    return line


def _pooled(line: Line, out: int, channels: int) -> Line:
    """Add the average over `out` x `out` elements of each channel to `line`."""
    line.mults += channels
    line.adds += (out**2 - 1) * channels
    return line


# ------------------------------------------------------------------------------ MicroNet and ResNet-20


def _micronet(network: nn.Module, size: int, b: int) -> tuple[list[Group], int]:
    """Groups and `params` of MicroNet."""
    shortcuts, ternary = [], []
    for name, block in _blocks(network):
        ternary.append(Layer(f"{name}.conv1", block.conv1, (block.bn1, block.bn2)))
        ternary.append(Layer(f"{name}.conv2", block.conv2, (block.bn3,)))
        if len(block.shortcut):
            shortcuts.append(Layer(f"{name}.shortcut.0", block.shortcut[0], (block.shortcut[1],)))
    return _residual_groups(network, shortcuts, ternary, size, b, _micronet_extras, last=RELU)


def _resnet(network: nn.Module, size: int, b: int) -> tuple[list[Group], int]:
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
    return _activated(layer.line("dense", layer.merged_params * b, v * n, (v - 1) * n + n), RELU, n)


def _shortcut(layer: Layer, i: int, size: int, b: int) -> Line:
    """The `i`-th shortcut, a 1x1 convolution with merged BatchNorm.

    Quirk: its stride counts as 2 always, though it is 1 between some stages of the ImageNet network.
    """
    n = _out(size, 1 / 2**i, kernel=1, stride=2, padding=0) ** 2 * layer.channels_out
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
        out = _out(size, div, layer.kernel, stride, padding=layer.kernel // 2)

        # Quirk: an input channel goes with the filter that was dead in the convolution before, although the
        # shortcut and the BatchNorm's bias may still feed it.
        dead_in, dead = dead, _dead_filters(layer.weight)
        nonzero_of_pair = (layer.weight != 0).sum(dim=(2, 3))  # [c_out, c_in]
        nonzero = int(nonzero_of_pair[~dead][:, ~dead_in].sum())
        live_in, live_out = _count_nonzero(~dead_in), _count_nonzero(~dead)
        numel = layer.kernel**2 * live_in * live_out

        n = out**2 * live_out
        v = nonzero / max(live_out, 1)
        note = _note(layer.weight, numel, nonzero, ternary=True)
        biases, mults, adds = extras(i, n, live_in, live_out)
        lines.append(
            layer.line(
                note,
                bits=_bits(note, numel, nonzero, b) + biases * b,
                mults=_mults(note, v, n) + mults,
                adds=(v - 1) * n + adds,
            )
        )
    pool = _pooled(Line("average pool"), math.ceil(size * div), live_out)
    return [*lines, _activated(pool, last, n)]


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


# ---------------------------------------------------------------------------------------- EfficientNet

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


def _efficientnet(network: nn.Module, size: int, b: int) -> tuple[list[Group], int]:
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
    return _out(size, div, layer.kernel, stride, padding=0)


def _convolution(layer: Layer, n: int, b: int, ternary: bool = False) -> Line:
    """A convolution with `n` outputs, or the classifier, with a bias or a merged BatchNorm."""
    numel, nonzero = layer.weight.numel(), _count_nonzero(layer.weight)
    v = nonzero / layer.channels_out
    note = _note(layer.weight, numel, nonzero, ternary)
    return layer.line(
        note,
        bits=_bits(note, numel, nonzero, b) + layer.channels_out * b,
        mults=_mults(note, v, n),
        adds=(v - 1) * n + n,
    )


def _stem(layer: Layer, size: int, b: int) -> Line:
    n = _outputs(layer, 1, size) ** 2 * layer.channels_out
    return _activated(_convolution(layer, n, b), SWISH, n)


def _expand(layer: Layer, div: float, size: int, b: int) -> Line:
    n = _outputs(layer, div, size) ** 2 * layer.channels_out
    return _activated(_convolution(layer, n, b, ternary=True), SWISH, n)


def _depthwise(layer: Layer, div: float, size: int, b: int) -> Line:
    n = _outputs(layer, div, size) ** 2 * layer.channels_out
    return _activated(_convolution(layer, n, b), SWISH, n)


def _se_reduce(layer: Layer, div: float, size: int, b: int) -> Line:
    """Average pool, 1x1 convolution of one pixel, swish."""
    n = layer.channels_out
    line = _activated(_convolution(layer, n, b), SWISH, n)
    return _pooled(line, _outputs(layer, div, size), layer.channels_in)


def _se_expand(layer: Layer, div: float, size: int, b: int) -> Line:
    """1x1 convolution of one pixel, sigmoid, and the multiplication of every channel by the result."""
    n = layer.channels_out
    line = _activated(_convolution(layer, n, b), SIGMOID, n)
    line.mults += _outputs(layer, div, size) ** 2 * layer.channels_out
    return line


def _project(layer: Layer, div: float, size: int, b: int) -> Line:
    n = _outputs(layer, div, size) ** 2 * layer.channels_out
    return _convolution(layer, n, b, ternary=True)


def _head(layer: Layer, size: int, b: int) -> Line:
    """1x1 convolution, swish, average pool."""
    out = _outputs(layer, 1 / 32, size)
    n = out**2 * layer.channels_out
    line = _activated(_convolution(layer, n, b, ternary=True), SWISH, n)
    return _pooled(line, out, layer.channels_out)


def _skip(project: Layer, div: float, size: int) -> Line:
    """The addition after a project convolution.

    Quirk: the size is multiplied by `div` twice and not rounded, so that far too few elements count.
    """
    block = project.name.removesuffix("._project_conv")
    return Line(block, adds=(size * div * div) ** 2 * project.channels_out)


FORMS = {"micronet": _micronet, "resnet": _resnet, "efficientnet": _efficientnet}
"""The closed form of each family of networks that has one."""

MODELS = tuple(row.name for row in ROWS.values() if row.family in FORMS)
