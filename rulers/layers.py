"""Convolutions and linear layers: operations that multiply what depends on the image by stored weights."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from model.levels import MOST_LEVELS
from rulers.storage import Code, Matrix, code_of
from rulers.values import Node, Value

CHUNK = 2**20  # weights that are looked at together, so that what is computed of them takes little memory
SAMPLE = 2048  # weights of which mostly more than MOST_LEVELS are distinct, if they are not quantized
FEW = 4  # values up to which comparing is faster than a search


@dataclass(eq=False)
class Layer:
    """A convolution or linear layer, functional or not, as it is executed and stored.

    `weights` is [c_out, c_in / groups, kernel], where kernel is 1 for a linear layer; `counts` [c_out] has the
    number of those that are not zero, and `code` says how they are written if few are distinct. `follows` says that
    the channels are the second dimension of input and output, so that constant ones can be followed through. `reads`
    [c_out, c_in / groups] says which inputs are not removed, None that all are there; `kept` [c_out] which filters are
    stored. A `shared` weight, which something else uses as well, is stored whole.
    """

    node: Node
    input: Value
    weight: Value
    bias: Value | None
    weights: Tensor
    follows: bool = True
    transposed: bool = False
    shared: bool = False
    norms: list[Node] = field(default_factory=list)
    reads: Tensor | None = None
    counts: Tensor = field(init=False)
    code: Code | None = field(init=False)
    kept: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.kept = torch.ones(len(self.weights), dtype=torch.bool)

    @cached_property
    def terms(self) -> Tensor:
        """[c_out, c_in / groups] the weights that are not zero."""
        return torch.count_nonzero(self.weights, dim=2)

    @cached_property
    def sums(self) -> Tensor:
        """[c_out, c_in / groups] the weights of each kernel, added up."""
        return self.weights.sum(dim=2)

    @property
    def summands(self) -> Tensor:
        """[c_out] values that one output of each filter sums over."""
        return self.counts if self.reads is None else (self.terms * self.reads).sum(dim=1)

    @property
    def live(self) -> Tensor:
        """[c_out] filters that are executed."""
        return self.summands > 0

    @property
    def positions(self) -> int:
        """How often each filter is applied: at each of its outputs, or, transposed, of its inputs."""
        if self.transposed:
            return self.input.numel // self.input.shape[1]
        return self.outputs

    @property
    def outputs(self) -> int:
        """Outputs of each filter."""
        return self.node.output.numel // len(self.weights)

    @property
    def biased(self) -> bool:
        return self.bias is not None or len(self.norms) > 0

    @property
    def pads(self) -> bool:
        return any(n != 0 for n in self.node.arguments.get("padding", ()))

    @property
    def shape(self) -> str:
        """Kernel, input size before padding, channels in and out, and how many of these are executed, for a reader."""
        filters, inputs, kernel = self.weights.shape
        pad = self.input.producer
        seen = pad.inputs[0] if pad and pad.operation == "constant_pad_nd" else self.input
        sizes = ["x".join(map(str, sides)) for sides in (self.weight.shape[2:], seen.shape[2:])]
        where = f"{sizes[0]} at {sizes[1]}, " if kernel > 1 or all(sizes) else ""
        groups = self.node.arguments.get("groups", 1)
        dead = filters - int(self.live.sum())
        grouped = f" in {groups} groups" if groups > 1 else ""
        return f"{where}{inputs * groups} -> {filters}{grouped}" + (f", {dead} dead" if dead else "")

    @property
    def matrix(self) -> Matrix:
        """What is stored of the weights."""
        _, inputs, kernel = self.weights.shape
        rows = int(self.kept.sum())
        if self.reads is None:
            columns, numel = inputs, rows * inputs
        else:
            stored = self.reads & self.kept[:, None]
            columns, numel = int(stored.sum(dim=1).max()), int(stored.sum())
        return Matrix(rows, columns * kernel, numel * kernel, int(self.summands.sum()), self.code)


def statistics(weights: Tensor) -> tuple[Tensor, Code | None]:
    """Of weights [rows, ...]: how many of each row are not zero, [rows], and their code, if few are distinct.

    One pass over them, and no more of it than is needed: what has many values mostly shows at once.
    """
    rows = max(1, CHUNK // max(weights[0].numel(), 1)) if len(weights) else 1
    counts, known = [torch.zeros(0, dtype=torch.int64)], _with(torch.zeros(1, dtype=weights.dtype), weights[:1])
    for chunk in weights.split(rows):
        chunk = chunk.flatten(1)
        if known is not None and not _has_all(known, chunk):
            known = _with(known, chunk)
        if int(torch.count_nonzero(chunk)) == chunk.numel():
            counts.append(torch.full((len(chunk),), chunk.shape[1]))
        else:
            counts.append((chunk != 0).sum(dim=1))
    return torch.cat(counts), code_of(known if known is None else known[known != 0], weights.numel())


def _with(known: Tensor, values: Tensor) -> Tensor | None:
    """The distinct values among `known`, sorted, and `values`; None if there are too many."""
    if known.is_complex():
        return None
    for part in (values.flatten()[:SAMPLE], values):  # the first ones mostly tell
        known = torch.cat([known, part.flatten()]).unique()
        if len(known) > MOST_LEVELS:
            return None
    return known


def _has_all(known: Tensor, values: Tensor) -> bool:
    """Whether all `values` are among `known`, sorted."""
    if len(known) <= FEW:
        return bool(torch.stack([values == value for value in known]).any(dim=0).all())
    places = torch.searchsorted(known, values.contiguous()).clamp_(max=len(known) - 1)
    return torch.equal(known[places], values)


# ----------------------------------------------------------------------------------------------- finding them

# Matrix products by operation: the names of left and right operand, and of what is added.
PRODUCTS = {
    "mm": ("self", "mat2", None),
    "addmm": ("mat1", "mat2", "self"),
    "bmm": ("self", "mat2", None),
    "baddbmm": ("batch1", "batch2", "self"),
    "mv": ("self", "vec", None),
    "addmv": ("mat", "vec", "self"),
    "dot": ("self", "tensor", None),
}


def find_layers(nodes: list[Node]) -> dict[Node, Layer]:
    """The layers among the operations `nodes`."""
    layers = {node: layer for node in nodes if (layer := _layer(node))}
    facts: dict[Hashable, tuple[Tensor, Code | None]] = {}
    for node, layer in layers.items():
        key = layer.weight.key, node.operation
        if key not in facts:
            facts[key] = statistics(layer.weights)
        layer.counts, layer.code = facts[key]
    readers: dict[int, list[tuple[int, int, Node]]] = {}  # the bytes of each memory that nodes read
    for node in nodes:
        for source in {source for value in node.inputs for source in value.sources}:
            readers.setdefault(source.storage._cdata, []).append((*source.region.span, node))
    for node, layer in layers.items():
        for source in layer.weight.sources:
            start, end = source.region.span
            others = readers[source.storage._cdata]
            layer.shared |= any(other is not node and first < end and start < last for first, last, other in others)
    return layers


def _layer(node: Node) -> Layer | None:
    """`node` as a layer; None for what is none, such as products of features."""
    arguments = node.arguments
    if node.operation == "convolution":
        weight, bias = arguments["weight"], arguments["bias"]
        if not weight.fixed or not (bias is None or bias.fixed):
            return None
        weights, transposed = weight.data, arguments["transposed"]
        if transposed:  # [c_in, c_out / groups, ...]
            weights = weights.unflatten(0, (arguments["groups"], -1)).transpose(1, 2).flatten(0, 1)
        return Layer(node, arguments["input"], weight, bias, weights.flatten(2), not transposed, transposed)
    if node.operation not in PRODUCTS:
        return None
    left, right, bias = (arguments.get(name or "") for name in PRODUCTS[node.operation])
    if left is None or right is None or left.fixed == right.fixed:
        return None
    weight, input = (right, left) if right.fixed else (left, right)
    weights = weight.data
    if weights.ndim == 1:
        weights = weights[None]
    elif right.fixed:
        weights = weights.transpose(-1, -2)
    if weights.ndim == 3:  # the same of all entries of the batch, or a group each
        weights = weights[0] if weight.region.stride[0] == 0 else weights.flatten(0, 1)
    follows = node.operation in ("mm", "addmm") and right.fixed
    if bias is not None and (not bias.fixed or bias.shape != (len(weights),)):
        follows = False
    return Layer(node, input, weight, bias, weights.unsqueeze(2), follows)
