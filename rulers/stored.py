"""What of a network is stored, and in how many bits.

Every element of a stored tensor counts once, however often and under whatever names, shapes and views it is read.
What is computed from stored tensors ahead of inference is stored instead of them where that is smaller: a weight
that is normalized, masked or cut out; but of a table whose rows are gathered, the table and the indices. Whole numbers
have the bits that the largest of them needs, masks one bit an element.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rulers.folding import Folding, is_batch_norm
from rulers.layers import Layer, statistics
from rulers.storage import Formats, Matrix, smallest
from rulers.values import Node, Stored, Value

FormatsOf = Callable[[Matrix, int], Formats]


@dataclass
class Share:
    """What an operation adds to what is stored; `note` is the format of its weights."""

    bits: int = 0
    numel: int = 0
    nonzero: int = 0
    note: str = ""


@dataclass(eq=False)
class Read:
    """A fixed value that an operation reads for the first time; `mask` has its elements that nothing read before.

    `mask` is over the bytes of the value's span in steps of its element's size, None for all of them; `layer` is the
    layer whose weight the value is.
    """

    node: Node
    value: Value
    mask: Tensor | None = None
    layer: Layer | None = None

    @cached_property
    def elements(self) -> Tensor:
        """The values that are read, each element once."""
        region, data = self.value.region, self.value.data
        if self.mask is None:
            return data
        start, _ = region.span
        flat = torch.empty(0, dtype=region.dtype).set_(
            self.value.storage, start // region.dtype.itemsize, (len(self.mask),), (1,)
        )
        return flat[self.mask]

    @cached_property
    def matrix(self) -> Matrix:
        """The values as a matrix of one row."""
        counts, code = statistics(self.elements.reshape(1, -1))
        return Matrix(1, self.elements.numel(), self.elements.numel(), int(counts), code)

    def format(self, formats: FormatsOf, b: int) -> tuple[str, int]:
        """The smallest format, and its bits."""
        dtype = self.value.region.dtype
        if dtype == torch.bool:
            return "", self.elements.numel()
        if not (dtype.is_floating_point or dtype.is_complex):
            low, high = (int(end) for end in self.elements.aminmax()) if self.elements.numel() else (0, 0)
            return "", self.elements.numel() * max(max(high, -low).bit_length() + (low < 0), 1)
        if self.layer and (self.mask is None or int(self.mask.sum()) == self.layer.weights.numel()):
            return smallest(formats(self.layer.matrix, b))
        name, bits = smallest(formats(self.matrix, b))
        return name, bits * (2 if dtype.is_complex else 1)


@dataclass
class Inventory:
    """Everything that is stored for the operations of a graph, by the operation that reads it first.

    `direct` are reads of the network's own tensors, `computed` groups of what is computed from them: each with the
    values that it needs, and the values that they come from, so far as nothing reads these directly.
    """

    direct: dict[Node, list[Read]] = field(default_factory=dict)
    computed: list[tuple[list[Read], list[Read]]] = field(default_factory=list)
    owners: dict[Node, list[Stored]] = field(default_factory=dict)
    facts: dict[Stored, int] = field(default_factory=dict)


def take_stock(nodes: list[Node], folding: Folding) -> Inventory:
    """Find out what is stored for `nodes`."""
    inventory, coverage = Inventory(), _Coverage()
    computed: dict[Hashable, Read] = {}
    seen: set[Stored] = set()
    for node in nodes:
        if node in folding.merged:
            continue
        layer = folding.layers.get(node)
        for value in fixed_inputs(node, folding):
            own = layer if layer and value is layer.weight else None
            if value.stored:
                if read := coverage.read(node, value, own):
                    inventory.direct.setdefault(node, []).append(read)
            elif value.sources:
                computed.setdefault(value.key, Read(node, value, layer=own))
            stored = {source.stored for source in value.sources if source.stored.trained} - seen
            seen |= stored
            inventory.owners.setdefault(node, []).extend(stored)
            for one in stored:
                same = own is not None and one.tensor.numel() == value.numel
                counts = own.counts.sum() if own and same else torch.count_nonzero(one.tensor)
                inventory.facts[one] = int(counts)
    for reads in _by_common_sources(list(computed.values())):
        sources = dict.fromkeys(source for read in reads for source in sorted(read.value.sources, key=_place))
        new = [read for source in sources if (read := coverage.read(reads[0].node, source, None))]
        inventory.computed.append((reads, new))
    return inventory


def fixed_inputs(node: Node, folding: Folding) -> list[Value]:
    """What `node`, and the BatchNorms that are merged into it, read and does not depend on the image."""
    layer = folding.layers.get(node)
    readers = [node, *layer.norms] if layer else [node]
    return list(dict.fromkeys(value for reader in readers for value in reader.inputs if value.fixed))


def shares(inventory: Inventory, folding: Folding, b: int, formats: FormatsOf) -> dict[Node, Share]:
    """What each operation adds to what is stored, in the smallest of the `formats` for values of `b` bits."""
    found: dict[Node, Share] = {}

    def add(read: Read, name: str, bits: int) -> None:
        share = found.setdefault(read.node, Share())
        share.bits += bits
        share.note = name if read.layer else share.note

    for node, reads in inventory.direct.items():
        _add_direct(node, reads, folding, b, formats, add)
    for reads, sources in inventory.computed:
        own = [read.format(formats, b) for read in reads]
        cost = sum(source.format(formats, b)[1] for source in sources)
        if sum(bits for _, bits in own) <= cost:
            for read, (name, bits) in zip(reads, own, strict=True):
                add(read, name, bits)
        else:
            add(reads[0], "", cost)
    for node, stored in inventory.owners.items():
        share = found.setdefault(node, Share())
        share.numel = sum(one.tensor.numel() for one in stored)
        share.nonzero = sum(inventory.facts[one] for one in stored)
    return found


def _add_direct(
    node: Node, reads: list[Read], folding: Folding, b: int, formats: FormatsOf, add: Callable[[Read, str, int], None]
) -> None:
    """Add what `node` reads of the network's own tensors: a BatchNorm is a scale and a bias, or a bias if merged."""
    layer = folding.layers.get(node)
    if is_batch_norm(node):
        add(reads[0], "", 2 * b * folding.varying_channels(node.output))
        return
    norms = {value for norm in layer.norms for value in norm.inputs} if layer else set()
    biases = [read for read in reads if layer and (read.value is layer.bias or read.value in norms)]
    for read in reads:
        if read not in biases:
            add(read, *read.format(formats, b))
    if layer and biases:
        full = not layer.norms and layer.bias is not None and layer.bias.shape != (len(layer.weights),)
        add(biases[0], "", biases[0].format(formats, b)[1] if full else int(layer.kept.sum()) * b)


def _place(value: Value) -> tuple[Any, ...]:
    return value.stored.name, value.region.span, value.region.size


class _Coverage:
    """Which elements of which memory have been read."""

    def __init__(self) -> None:
        self._seen: dict[int, list[tuple[int, int, Tensor | None]]] = {}  # by memory: start, end, mask; in bytes

    def read(self, node: Node, value: Value, layer: Layer | None) -> Read | None:
        """The elements of `value` that are new, None if there are none; from now on they are known."""
        start, end = value.region.span
        size = value.region.dtype.itemsize
        seen = self._seen.setdefault(value.storage._cdata, [])
        overlapping = [one for one in seen if one[0] < end and start < one[1]]
        mask = None
        if value.numel * size != end - start or len(set(_axes(value))) < len(_axes(value)):
            mask = _elements(value)
        if any(one == (start, end, None) for one in overlapping):
            return None
        if overlapping:
            mask = torch.ones((end - start) // size, dtype=torch.bool) if mask is None else mask
            for first, last, other in overlapping:
                low, high = max(first, start), min(last, end)
                known = slice((low - first) // size, (high - first) // size)
                here = mask[(low - start) // size : (high - start) // size]
                here &= False if other is None else ~other[known]
            if not mask.any():
                return None
        seen.append((start, end, mask))
        return Read(node, value, mask, layer)


def _axes(value: Value) -> list[int]:
    """The strides of a tensor's dimensions of more than one element."""
    return [step for n, step in zip(value.region.size, value.region.stride, strict=True) if n > 1]


def _elements(value: Value) -> Tensor:
    """A mask over the span of `value` of the elements that it has."""
    start, end = value.region.span
    mask = torch.zeros((end - start) // value.region.dtype.itemsize, dtype=torch.bool)
    mask.as_strided(value.region.size, value.region.stride).fill_(True)
    return mask


def _by_common_sources(reads: list[Read]) -> list[list[Read]]:
    """The reads in groups, such that no stored tensor is a source of two groups."""
    groups: list[tuple[set[Hashable], list[Read]]] = []
    for read in reads:
        keys, members = {source.key for source in read.value.sources}, list[Read]()
        apart = []
        for others, group in groups:
            if keys & others:
                keys, members = keys | others, members + group
            else:
                apart.append((others, group))
        groups = [*apart, (keys, [*members, read])]
    return [group for _, group in groups]
