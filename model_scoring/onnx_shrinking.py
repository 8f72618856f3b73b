"""Removing an ONNX graph's dead channels for real: what it computes stays the same, with fewer operations.

A channel is dead where no operation reads it, or where what they read of it is known whatever the input is: a filter of
zeros gives its bias, at every place. Readers then do without it, and add what they read to their biases; a reader that
pads its input can do so only where that is zero.

Channels that are added, or multiplied, are removed together or not at all: such values form a group. A group is left
alone where an operation takes part that isn't listed here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

UNARY = ("Relu", "LeakyRelu", "Elu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softplus", "Identity")
POOLING = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean")  # of known values: the same
MULTIPLE = 8  # of channels: runtimes are slower with others than with as many more as fill it
BINARY = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}


def shrink(model: onnx.ModelProto, weights: dict[str, np.ndarray], multiple: int = MULTIPLE) -> tuple[int, int]:
    """Remove dead channels from `model`, in place; `weights`, arrays by an initializer's name, are cut likewise.

    So many stay that each group has a `multiple` of channels, as far as it had one.

    Returns how many channels were removed, and how many there were that could be.
    """
    removed, number = 0, None
    while True:
        graph = _Graph(model, weights)
        groups = graph.groups()
        number = number or sum(group.channels for group in groups)
        now = sum(graph.cut(group, multiple) for group in groups)
        graph.write()
        if not now:
            return removed, number
        removed += now


@dataclass
class _Group:
    """Values between operations that have their channels in common.

    Attributes:
        channels: their number.
        writers: operations that make the channels of what they read in all others, and
        readers: such that read them, each with its input.
        alike: constants with an entry a channel, each with the axis of the channels.
        depthwise: convolutions within the group.
        shapes: constants that are the shape of a value of the group.
        open: whether something else takes part.
    """

    channels: int
    writers: list[onnx.NodeProto] = field(default_factory=list)
    readers: list[tuple[onnx.NodeProto, str]] = field(default_factory=list)
    alike: list[tuple[str, int]] = field(default_factory=list)
    depthwise: list[onnx.NodeProto] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    open: bool = False


class _Graph:
    def __init__(self, model: onnx.ModelProto, weights: dict[str, np.ndarray]):
        from onnx import numpy_helper, shape_inference

        self.model, self.weights = model, weights
        self.constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
        self.changed: set[str] = set()
        self.uses = Counter(name for node in model.graph.node for name in node.input)
        inferred = shape_inference.infer_shapes(model).graph
        self.shapes = {
            value.name: [each.dim_value for each in value.type.tensor_type.shape.dim]
            for value in (*inferred.value_info, *inferred.input, *inferred.output)
        }
        self.known = self._known()

    def groups(self) -> list[_Group]:
        """All groups that are not open."""
        parents: dict[str, str] = {}

        def root(name: str) -> str:
            while (up := parents.setdefault(name, name)) != name:
                name = up
            return name

        for node in self.model.graph.node:
            if self._kind(node) in ("within", "depthwise"):
                first, *others = (*self._activations(node), node.output[0])
                for other in others:
                    parents[root(other)] = root(first)
        found: dict[str, _Group] = defaultdict(lambda: _Group(0))
        outside = [value.name for value in (*self.model.graph.input, *self.model.graph.output)]
        for name in outside:
            found[root(name)].open = True
        for node in self.model.graph.node:
            self._join(node, lambda name: found[root(name)])
        return [group for group in found.values() if group.channels > 1 and group.writers and not group.open]

    def _join(self, node: onnx.NodeProto, group_of: Any) -> None:
        """Note the part that an operation has in the groups of what it reads and writes."""
        kind, inputs = self._kind(node), self._activations(node)
        if kind == "between":
            group = group_of(node.output[0])
            group.channels = self._channels(node.output[0])
            group.writers.append(node)
            group_of(inputs[0]).readers.append((node, inputs[0]))
        elif kind in ("within", "depthwise"):
            group = group_of(node.output[0])
            sizes = {self._channels(name) for name in (*inputs, node.output[0])}
            group.open |= len(sizes) > 1 or 0 in sizes
            if kind == "depthwise":
                group.depthwise.append(node)
            elif node.op_type == "Reshape":
                group.shapes.append(node.input[1])
            elif node.op_type in BINARY:
                for name in set(node.input) & self.constants.keys():
                    group.alike += [(name, axis) for axis in [self._channel_axis(name, node.output[0])] if axis >= 0]
        else:
            for name in (*inputs, *node.output):
                group_of(name).open = True

    def _kind(self, node: onnx.NodeProto) -> str:
        """How an operation treats channels: "between" others, "depthwise", "within" the same ones, or unknown, ""."""
        own = [name for name in node.input if name in self.constants]
        if node.op_type in ("Conv", "Gemm"):
            alone = all(self.uses[name] == 1 for name in own)
            if len(own) != len(node.input) - 1 or node.input[0] in own or not alone:
                return ""
            attributes = _attributes(node)
            if node.op_type == "Gemm":
                plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
                return "between" if plain and attributes.get("transB") and not attributes.get("transA") else ""
            groups, outputs = attributes.get("group", 1), len(self.constants[node.input[1]])
            depthwise = groups == outputs == self._channels(node.input[0])
            return "between" if groups == 1 else "depthwise" if depthwise else ""
        if node.op_type == "Reshape":
            before, after = (self.shapes.get(name, []) for name in (node.input[0], node.output[0]))
            same = len(before) > 1 and prod(before[2:]) == 1 and after[1:] == before[1:2]
            return "within" if same and node.input[1] in own and self.uses[node.input[1]] == 1 else ""
        if node.op_type == "ReduceMean":
            rank = len(self.shapes.get(node.input[0], []))
            axes = [axis % rank for axis in self.constants[own[0]].tolist()] if own and rank else [0]
            return "within" if min(axes) > 1 else ""
        if node.op_type in BINARY:
            alone = all(self.constants[name].size == 1 or self.uses[name] == 1 for name in own)
            ranks = {len(self.shapes.get(name, [])) for name in (*self._activations(node), node.output[0])}
            return "within" if alone and len(ranks) == 1 else ""
        return "within" if node.op_type in (*UNARY, *POOLING) and len(node.output) == 1 else ""

    def _activations(self, node: onnx.NodeProto) -> list[str]:
        return [name for name in node.input if name and name not in self.constants]

    def _channels(self, name: str) -> int:
        """The number of channels of a value; 0 where it is not known."""
        return next(iter(self.shapes.get(name, [])[1:2]), 0)

    def _channel_axis(self, constant: str, value: str) -> int:
        """The axis of a constant that lies along the channels of `value`; -1 if there is none."""
        shape = self.constants[constant].shape
        axis = 1 - (len(self.shapes[value]) - len(shape))
        return axis if 0 <= axis < len(shape) and shape[axis] > 1 else -1

    def _known(self) -> dict[str, np.ndarray]:
        """By value, what each of its channels is at every place and for every input; NaN where that depends."""
        known: dict[str, np.ndarray] = {}
        for node in self.model.graph.node:
            kind, inputs = self._kind(node), self._activations(node)
            if not kind or not (channels := self._channels(node.output[0])):
                continue
            before = [known.get(name, np.full(self._channels(name), np.nan)) for name in inputs]
            if any(len(each) != channels for each in before) and kind != "between":
                continue
            known[node.output[0]] = self._result(node, kind, before, channels)
        return known

    def _result(self, node: onnx.NodeProto, kind: str, before: list[np.ndarray], channels: int) -> np.ndarray:
        """What is known of an operation's result."""
        if kind in ("between", "depthwise"):
            weight = self.constants[node.input[1]]
            taps = weight.reshape(*weight.shape[:2], -1)
            read = before[0][:, None] if kind == "depthwise" else before[0][None]
            read = np.where(~np.isnan(read) & ((read == 0) | self._unpadded(node)), read, np.nan)
            return np.where(taps.any(2), taps.sum(2) * read, 0).sum(1) + self._bias(node)
        if node.op_type in BINARY:
            return self._binary(node, before, channels)
        if node.op_type == "AveragePool" and not self._unpadded(node):
            return np.where(before[0] == 0, before[0], np.nan)
        if node.op_type in (*POOLING, "Reshape"):
            return before[0]
        return _evaluated(node, before[0], self.constants)

    def _binary(self, node: onnx.NodeProto, before: list[np.ndarray], channels: int) -> np.ndarray:
        """What is known of a sum, difference or product; of a product, that it is zero where one factor is."""
        values, activations = [], iter(before)
        for name in node.input:
            if name not in self.constants:
                values.append(next(activations))
                continue
            flat = self.constants[name].reshape(-1)
            alike = flat.size == channels and self._channel_axis(name, node.output[0]) >= 0
            values.append(np.broadcast_to(flat if alike or flat.size == 1 else np.nan, channels))
        result = BINARY[node.op_type](*values)
        if node.op_type == "Mul":
            result = np.where((values[0] == 0) | (values[1] == 0), 0, result)
        return result

    def _unpadded(self, node: onnx.NodeProto) -> bool:
        attributes = _attributes(node)
        return attributes.get("auto_pad", b"NOTSET") == b"NOTSET" and not any(attributes.get("pads", []))

    def _bias(self, node: onnx.NodeProto) -> np.ndarray:
        return self.constants[node.input[2]] if len(node.input) > 2 else np.zeros(1, np.float32)

    def cut(self, group: _Group, multiple: int) -> int:
        """Remove dead channels of a group, and say how many; one at least stays, and as many as fill a `multiple`."""
        alive = [~self._is_dead(node, name) for node, name in group.readers]
        keep: np.ndarray = np.any(alive, 0) if alive else np.ones(group.channels, bool)
        wanted = -(-max(int(keep.sum()), 1) // multiple) * multiple
        keep[np.flatnonzero(~keep)[: wanted - int(keep.sum())]] = True
        if keep.all():
            return 0
        for node, name in group.readers:
            self._read_less(node, name, keep)
        for node in (*group.writers, *group.depthwise):
            for constant in node.input[1:]:
                self._take(constant, keep, 0)
        for node in group.depthwise:
            next(each for each in node.attribute if each.name == "group").i = int(keep.sum())
        for constant, axis in group.alike:
            self._take(constant, keep, axis)
        for constant in group.shapes:
            self._set(constant, np.array([*self.constants[constant][:1], keep.sum()], np.int64))
        return int((~keep).sum())

    def _is_dead(self, node: onnx.NodeProto, name: str) -> np.ndarray:
        """Which of the channels a reader can do without."""
        weight = self.constants[node.input[1]]
        unread = ~np.any(weight != 0, axis=(0, *range(2, weight.ndim)))
        known = self.known.get(name, np.full(len(unread), np.nan))
        return unread | (~np.isnan(known) & ((known == 0) | self._unpadded(node)))

    def _read_less(self, node: onnx.NodeProto, name: str, keep: np.ndarray) -> None:
        """Let a reader do without the channels that go: what it read of them joins its bias."""
        weight = self.constants[node.input[1]]
        known = np.nan_to_num(self.known.get(name, np.zeros(len(keep))))
        gone = (weight.reshape(*weight.shape[:2], -1).sum(2) * np.where(keep, 0, known)).sum(1)
        if gone.any():
            bias = (self._bias(node) + gone).astype(weight.dtype)
            if len(node.input) < 3:
                node.input.append(f"{node.input[1]}_bias")
            self._set(node.input[2], bias)
        self._take(node.input[1], keep, 1)

    def _take(self, name: str, keep: np.ndarray, axis: int) -> None:
        """Keep some entries of a constant, and of the stored weight of its name."""
        if name in self.weights and self.weights[name].shape == self.constants[name].shape:
            self.weights[name] = np.compress(keep, self.weights[name], axis)
        self._set(name, np.compress(keep, self.constants[name], axis))

    def _set(self, name: str, values: np.ndarray) -> None:
        self.constants[name] = values
        self.changed.add(name)

    def write(self) -> None:
        """Put changed constants into the model, and drop the shapes of values that were."""
        from onnx import numpy_helper

        others = [each for each in self.model.graph.initializer if each.name not in self.changed]
        new = [numpy_helper.from_array(np.ascontiguousarray(self.constants[n]), n) for n in sorted(self.changed)]
        del self.model.graph.initializer[:], self.model.graph.value_info[:]
        self.model.graph.initializer.extend([*others, *new])


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def _evaluated(node: onnx.NodeProto, values: np.ndarray, constants: dict[str, np.ndarray]) -> np.ndarray:
    """An operation on single values, by ONNX's own reference."""
    from onnx import TensorProto, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    value = helper.make_tensor_value_info
    stored = [numpy_helper.from_array(constants[name], name) for name in node.input if name in constants]
    inputs, outputs = ([value(names[0], TensorProto.FLOAT, None)] for names in (node.input, node.output))
    graph = helper.make_graph([node], "one", inputs, outputs, stored)
    result: Any = ReferenceEvaluator(helper.make_model(graph)).run(None, {node.input[0]: values.astype(np.float32)})
    return np.where(np.isnan(values), np.nan, result[0])
