"""What is computed ahead of inference: BatchNorms that merge into a layer, and channels that are constant.

A *layer* here is a convolution or a linear layer, functional or not.

**BatchNorm.** In evaluation mode it is a scale and a bias for each channel. Where it is the only reader of a
layer's output, that layer takes the scale into its weights, and the bias as its own. (A ternary layer's
weights are two values then only up to one factor per output channel, which the challenge's rules allow.)
Every other BatchNorm is executed. One that stands before a convolution, as in the MicroNet block, could be
merged forward only where nothing else reads its input and where the convolution does not pad.

**Dead channels.** An output channel all of whose weights are zero is dead. It is a constant, its bias, and
stays one through BatchNorm, activation, product and pooling: nothing of it is executed. Where the constant
enters another layer, that input is removed, with its weights, if this leaves the outputs as they were:

- the constant is zero, or
- the layer neither pads nor lacks a bias: the constant, times the weights, joins the bias (a layer that pads
  sees where the constant ends, and no bias does that), or
- all weights that would read it are zero.

The channel itself is removed, its row of weights and its bias, if every layer that it reaches removes it.
Otherwise, because it reaches a residual addition, the network's output, a layer that has to see it or an
operation that is not followed here, its row of zeros stays in the mask and its constant is stored as its
bias. A filter whose inputs are all removed is dead in turn.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rulers.layers import Layer, find_layers
from rulers.values import Node, Value

BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")

# Operations that map each element by itself, and so a constant.
_ELEMENTWISE = ("relu", "hardtanh", "clamp", "clamp_min", "silu", "sigmoid", "hardswish", "hardsigmoid")

# Operations that leave a constant as it is, where the channels stay the second dimension.
_MOVING = ("view", "_unsafe_view", "squeeze", "unsqueeze", "expand", "slice", "clone", "detach", "alias")
_UNCHANGING = (*_MOVING, "mean", "_adaptive_avg_pool2d")


@dataclass
class Folding:
    """What of a graph is left to inference.

    `constants` has for a value [1, C, ...] with constant channels their values [C], NaN for all others.
    """

    layers: dict[Node, Layer] = field(default_factory=dict)
    merged: dict[Node, Layer] = field(default_factory=dict)
    constants: dict[Value, Tensor] = field(default_factory=dict)

    def varying_channels(self, value: Value) -> int:
        """Channels of `value` [1, C, ...] that are not constant."""
        return int(self.constants[value].isnan().sum()) if value in self.constants else value.shape[1]

    def varying(self, value: Value) -> int:
        """Elements of `value` that are not constant."""
        if value not in self.constants:
            return value.numel
        return value.numel // value.shape[1] * self.varying_channels(value)


def fold(nodes: list[Node]) -> Folding:
    """Decide what of the operations `nodes` is computed ahead of inference."""
    folding = Folding(find_layers(nodes))
    _merge_batch_norms(nodes, folding)
    _follow_constants(nodes, folding)
    return folding


# ----------------------------------------------------------------------------------------------- BatchNorms


def is_batch_norm(node: Node) -> bool:
    """Whether `node` is a BatchNorm with stored statistics, not with those of the image."""
    return node.operation in BATCH_NORMS and not node.arguments.get("training", False)


def _merge_batch_norms(nodes: list[Node], folding: Folding) -> None:
    for node in filter(is_batch_norm, nodes):
        before = node.arguments["input"].producer
        layer = folding.layers.get(before) or folding.merged.get(before)
        if layer is None:
            continue
        mergeable = not layer.shared and (layer.follows or layer.transposed)
        if mergeable and node.arguments["input"].consumers == [node]:
            layer.norms.append(node)
            folding.merged[node] = layer


def _normalized(node: Node, constants: Tensor) -> Tensor:
    """What BatchNorm makes of one value [C] per channel."""
    mean, variance = (node.arguments[name].data.double() for name in ("running_mean", "running_var"))
    scale, bias = (node.arguments[name] for name in ("weight", "bias"))
    eps = node.arguments["epsilon" if "epsilon" in node.arguments else "eps"]
    normal = (constants - mean) / (variance + eps).sqrt()
    return normal * (1 if scale is None else scale.data.double()) + (0 if bias is None else bias.data.double())


# ------------------------------------------------------------------------------------------------ constants


def _follow_constants(nodes: list[Node], folding: Folding) -> None:
    """Find the constant channels, remove the inputs that can go, and keep the channels that cannot."""
    constants = folding.constants
    sources: dict[Value, set[Layer]] = {}  # whose output channels a value's constants are

    def keep(value: Value, channels: Tensor) -> None:
        for layer in sources[value]:
            layer.kept |= channels

    for node in nodes:
        known = [value for value in dict.fromkeys(node.inputs) if value in constants]
        if node in folding.layers:
            layer = folding.layers[node]
            gone = _remove_inputs(layer, constants.get(layer.input))
            output = _dead_outputs(layer, constants.get(layer.input))
            origin = {layer}
        else:
            output = _carried(node, constants) if known else None
            gone = torch.tensor(False) if output is None else ~output.isnan()
            origin = set().union(*(sources[value] for value in known))
        for value in known:
            keep(value, ~constants[value].isnan() & ~gone)
        if output is not None and not output.isnan().all():
            constants[node.output] = output
            sources[node.output] = origin
            if not node.output.consumers:
                keep(node.output, ~output.isnan())


def _remove_inputs(layer: Layer, constants: Tensor | None) -> Tensor:
    """Remove those inputs of `layer` that can go, and all dead filters; return which inputs, [c_in]."""
    gone = torch.tensor(False)
    if constants is not None and layer.follows and not layer.shared:
        unread = ~_by_input(layer.terms, layer).any(dim=0)
        can_join_the_bias = (constants == 0) | (layer.biased and not layer.pads)
        gone = ~constants.isnan() & (can_join_the_bias | unread)
        layer.reads = ~_by_filter(gone, layer)
    if layer.follows and not layer.shared:
        layer.kept = layer.live
    return gone


def _dead_outputs(layer: Layer, constants: Tensor | None) -> Tensor | None:
    """[c_out] the bias of dead filters, with what removed inputs add to it; NaN for the others."""
    live = layer.live
    if not layer.follows or bool(live.all()):
        return None
    outputs = torch.zeros(len(live), dtype=torch.float64)
    if layer.bias is not None:
        outputs += layer.bias.data
    if constants is not None and layer.reads is not None:
        inputs = _by_filter(constants.nan_to_num(), layer).where(~layer.reads, 0)
        outputs += (inputs * layer.sums).sum(dim=1)
    return outputs.where(~live, torch.nan)


def _by_filter(channels: Tensor, layer: Layer) -> Tensor:
    """Spread a tensor [c_in] over the inputs of each filter, [c_out, c_in / groups]."""
    filters, inputs = layer.weights.shape[:2]
    groups = len(channels) // inputs
    return channels.view(groups, 1, inputs).expand(groups, filters // groups, inputs).reshape(filters, inputs)


def _by_input(terms: Tensor, layer: Layer) -> Tensor:
    """Gather a tensor [c_out, c_in / groups] by the inputs' channels, [c_out / groups, c_in]."""
    filters, inputs = terms.shape
    groups = layer.input.shape[1] // inputs
    return terms.view(groups, filters // groups, inputs).transpose(0, 1).reshape(filters // groups, -1)


def _carried(node: Node, constants: dict[Value, Tensor]) -> Tensor | None:
    """The constants [C] of an operation's output, NaN where it varies; None if they are not followed."""
    first, *others = node.arguments.values()
    if not isinstance(first, Value) or first not in constants:
        return None
    values = constants[first]
    if is_batch_norm(node):
        return _normalized(node, values)
    if node.operation == "mul" and isinstance(others[0], Value) and others[0] in constants:
        return values * constants[others[0]] if len(values) == len(constants[others[0]]) else None
    if any(isinstance(value, Value) for value in others):
        return None
    if node.operation in _ELEMENTWISE:
        return getattr(torch.ops.aten, node.operation)(values, *others).where(~values.isnan(), torch.nan)
    if node.output.shape[:2] != first.shape[:2]:
        return None
    if node.operation == "constant_pad_nd":
        return values.where(values == node.arguments["value"], torch.nan)
    return values if node.operation in _UNCHANGING else None
