"""What a graph is made of: memories, the values that lie in them, and the operations that read and make them."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_iter

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """Which elements of a memory a tensor is; strides of dimensions of one element are 0."""

    dtype: torch.dtype
    size: Shape
    stride: Shape
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Region":
        stride = tuple(step if n > 1 else 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(tensor.dtype, tuple(tensor.shape), stride, int(tensor.storage_offset()))

    def on(self, storage: UntypedStorage) -> Tensor:
        """The tensor at this region of `storage`."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)

    @property
    def span(self) -> tuple[int, int]:
        """The bytes from the first element to behind the last one."""
        elements = 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        start = self.offset * self.dtype.itemsize
        return start, start + (elements * self.dtype.itemsize if 0 not in self.size else 0)


@dataclass(eq=False)
class Stored:
    """A tensor that the network keeps: a parameter, a buffer, or, without a name, one that its code holds."""

    name: str
    tensor: Tensor
    trained: bool


@dataclass(eq=False)
class Memory:
    """What tensors that share memory have in common.

    `fixed`: what lies here does not depend on the image. `storage` holds the values then, `key` is equal for
    memories that were computed in the same way, and `sources` are the stored values that they come from.
    `kept` are the network's own tensors that lie here unchanged. `parts` are the values that operations wrote.
    """

    fixed: bool
    key: Hashable
    storage: Any = None  # an UntypedStorage
    shapes: UntypedStorage | None = None
    kept: list[Stored] = field(default_factory=list)
    sources: "frozenset[Value]" = frozenset()
    values: "dict[Region, Value]" = field(default_factory=dict)
    parts: "list[Value]" = field(default_factory=list)


@dataclass(eq=False)
class Value:
    """A tensor of the forward pass, between two writes to its memory.

    `fixed` says that it does not depend on the image: `storage` has its values then, and `sources` the stored
    values that they were computed from; `stored` is the stored tensor that it is, or is a view of. `key` is equal
    for values that were computed in the same way. `producer` is None if no operation of the graph made it: the
    image, and everything fixed.
    """

    region: Region
    fixed: bool = False
    key: Hashable = None
    storage: Any = None  # an UntypedStorage
    stored: Any = None  # a Stored
    sources: "frozenset[Value]" = frozenset()
    producer: "Node | None" = None
    consumers: "list[Node]" = field(default_factory=list)

    @property
    def data(self) -> Tensor:
        """Its values; it must be fixed."""
        return self.region.on(self.storage)

    @property
    def shape(self) -> Shape:
        return self.region.size

    @property
    def numel(self) -> int:
        return torch.Size(self.region.size).numel()


@dataclass(eq=False)
class Node:
    """One executed operation.

    `operation` is aten's name without overload and in-place underscore; `arguments` are named as in aten's
    schema, with a `Value` for every tensor that is read; `place` is the path of the innermost module that ran it,
    and `leaf` says that this module has no children, so that the path alone tells what it does.
    """

    operation: str
    arguments: dict[str, Any]
    outputs: list[Value]
    place: str
    leaf: bool

    @property
    def output(self) -> Value:
        return self.outputs[0]

    @property
    def inputs(self) -> list[Value]:
        """The tensors among the arguments."""
        return [value for value in tree_iter(self.arguments) if isinstance(value, Value)]

    @property
    def name(self) -> str:
        """The module's path, and the operation where the path does not tell it."""
        return self.place if self.leaf and self.place else f"{self.place} {self.operation}".strip()
