"""Weights of an ONNX graph as symbols that the graph decodes: small in the file, dense in the runtime.

The operations are ONNX's oldest (Cast, Div, Mod, Gather, ...) on constants alone, so that runtimes fold them when they
load the file; CumSum, which masks would need and OpenVINO would keep in every run, is done by products of matrices. An
initializer becomes

    symbols  where few of its values are distinct: digits to the base of their number, as many a word as fit,
             and a table of what they stand for
    a mask   and the symbols or values that are not zero, where that is smaller
    float16  where that is exact

All that is stored alike lies one behind the other in one initializer, which is decoded at once and split. A weight is
multiplied by a factor a channel where the exporter merged a BatchNorm into it: what was merged has values of its
own in every channel, the stored weight has not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from model.levels import is_codebook, levels_of

if TYPE_CHECKING:
    import onnx

LEAST = 64  # values from which on an initializer is looked at
FLOAT32, INT32, INT64 = 1, 6, 7  # ONNX's numbers of types
MASK = 600  # bytes of the nodes that decode a mask
BLOCK = 64  # values whose running sum is one product with a triangular matrix
EXACT = 1e-6  # of the largest value: what float32 products may differ by
WORDS = ((np.uint8, 8), (np.uint16, 16), (np.int32, 31))  # types of words, and their bits


def compact(graph: onnx.GraphProto, weights: dict[str, np.ndarray]) -> list[str]:
    """Replace initializers of `graph` by what is smaller; `weights` has the stored ones by name.

    Returns the names of those that are symbols.
    """
    from onnx import numpy_helper

    decoder, kept = _Decoder(), []
    for initializer in graph.initializer:
        values = numpy_helper.to_array(initializer)
        large = values.dtype == np.float32 and values.size >= LEAST
        if not large or not decoder.add(initializer.name, *_without_scale(values, weights.get(initializer.name))):
            kept.append(initializer)
    nodes, initializers = decoder.finish()
    others = list(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend([*kept, *initializers])
    graph.node.extend([*nodes, *others])
    return decoder.quantized


def words_of(base: int) -> tuple[type, int]:
    """The type of words that takes the fewest bits a digit, and how many digits a word holds."""
    held = [(dtype, int(bits / np.log2(base) + 1e-9)) for dtype, bits in WORDS]
    return min(((dtype, n) for dtype, n in held if n), key=lambda one: np.dtype(one[0]).itemsize / one[1])


def bits_of(base: int) -> float:
    """Bits that a digit takes in such words."""
    dtype, digits = words_of(base)
    return 8 * np.dtype(dtype).itemsize / digits


def _without_scale(values: np.ndarray, stored: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The stored weight, and the factor a channel that makes `values` of it; `values` and None where there is none."""
    if stored is None or stored.shape != values.shape or np.array_equal(stored, values):
        return values, None
    for axis in range(min(values.ndim, 2)):  # convolutions have channels out first, transposed ones second
        rows, products = (np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) for array in (stored, values))
        largest = np.arange(len(rows)), np.abs(rows).argmax(1)
        there = rows[largest] != 0
        scale = np.divide(products[largest], rows[largest], out=np.zeros(len(rows), np.float32), where=there)
        if np.abs(rows * scale[:, None] - products).max() <= EXACT * np.abs(products).max():
            return stored, scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return values, None


@dataclass
class _Weight:
    """An initializer to be decoded: the graph's name of it, its shape, what it is multiplied by, its levels."""

    name: str
    shape: tuple[int, ...]
    scale: np.ndarray | None
    stream: np.ndarray
    levels: np.ndarray | None = None


class _Decoder:
    """Nodes and initializers that compute weights from what is stored of them."""

    def __init__(self) -> None:
        self.quantized: list[str] = []
        self._triangle = ""
        self._groups: defaultdict[tuple[str, int], list[_Weight]] = defaultdict(list)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}

    def add(self, name: str, values: np.ndarray, scale: np.ndarray | None) -> bool:
        """Decode `values`, times `scale`, to what the graph calls `name`; False where nothing is smaller than they."""
        flat = values.reshape(-1)
        half = flat.astype(np.float16) if np.abs(flat).max() <= np.finfo(np.float16).max else flat
        stored = half if np.array_equal(half.astype(np.float32), flat) else flat
        weight = _Weight(name, values.shape, scale, stored)
        levels = levels_of(flat)
        if levels and (levels.steps is not None or is_codebook(levels.values.size, flat.size)):
            weight.stream, weight.levels = levels.symbols.astype(np.int64), levels.values.astype(np.float32)
            self._groups["symbols", max(levels.values.size, 2)].append(weight)
            self.quantized.append(name)
        elif MASK + flat.size / 8 + np.count_nonzero(flat) * stored.itemsize < stored.nbytes:
            self._groups["masked", stored.itemsize].append(weight)
        elif stored.dtype == np.float16:
            self._groups["dense", stored.itemsize].append(weight)
        return any(group and group[-1] is weight for group in self._groups.values())

    def finish(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """All nodes in an order in which they can run, and all initializers."""
        for (kind, base), group in self._groups.items():
            stream = np.concatenate([weight.stream for weight in group])
            if kind == "symbols":
                decoded, length = self._symbols(stream, base)
            elif kind == "masked":
                decoded, length = self._masked(stream, self._cast(self._constant(stream[stream != 0])))
            else:
                decoded, length = self._cast(self._constant(stream)), stream.size
            parts, sizes = [f"{weight.name}:stored" for weight in group], [weight.stream.size for weight in group]
            if length > stream.size:
                parts, sizes = [*parts, f"{parts[0]}:padding"], [*sizes, length - stream.size]
            self._node("Split", decoded, self._constant(np.array(sizes, np.int64)), outputs=parts, axis=0)
            for weight, part in zip(group, parts, strict=False):
                self._restore(weight, part)
        return self._nodes, list(self._constants.values())

    def _restore(self, weight: _Weight, part: str) -> None:
        """From a part of a stream to the weight."""
        if weight.levels is not None:
            part = self._node("Gather", self._constant(weight.levels), part)
        part = self._reshaped(part, *weight.shape)
        if weight.scale is not None:
            self._node("Mul", part, self._constant(weight.scale))
        self._nodes[-1].output[0] = weight.name

    def _symbols(self, symbols: np.ndarray, base: int) -> tuple[str, int]:
        """Symbols below `base`, int32: of all, or behind a mask those that are not zero; the output, and its length."""
        there = symbols[symbols != 0]
        if base == 2 or symbols.size + there.size * bits_of(base - 1) >= symbols.size * bits_of(base):
            return self._digits(symbols, base)
        signs, _ = self._digits(there - 1, max(base - 1, 2))
        return self._masked(symbols, self._node("Add", signs, self._constant(np.ones(1, np.int32))))

    def _masked(self, stream: np.ndarray, values: str) -> tuple[str, int]:
        """What is zero where `stream` is, and elsewhere the next one of `values`."""
        there = (stream != 0).astype(np.int64)
        mask, length = self._digits(np.pad(there, (0, -there.size % BLOCK)), 2)
        mask = self._cast(mask)
        sums = self._running_sums(mask, length)
        number = self._cast(self._node("Mul", self._reshaped(sums, -1), mask), INT64)
        zero = np.zeros(1, np.float32 if stream.dtype.kind == "f" else np.int32)
        return self._node("Gather", self._node("Concat", self._constant(zero), values, axis=0), number), length

    def _running_sums(self, counts: str, length: int) -> str:
        """Sums of `counts`, float32 `[length]`, up to each of them, `[length / BLOCK, BLOCK]`: exact below 2**24."""
        if not self._triangle:
            row = self._cast(self._constant(np.arange(BLOCK, dtype=np.uint8)[None]), INT32)
            later = self._node("Less", row, self._node("Transpose", row))
            self._triangle = self._cast(self._node("Not", later))  # [i, j]: 1 where j >= i
        within = self._node("MatMul", self._reshaped(counts, -1, BLOCK), self._triangle)
        if length == BLOCK:
            return within
        number, filled = length // BLOCK, -(-length // BLOCK**2) * BLOCK
        totals = self._node("Gather", within, self._constant(np.array([BLOCK - 1])), axis=1)
        padding = self._constant(np.zeros((filled - number, 1), np.float32))
        ends = self._running_sums(self._node("Concat", totals, padding, axis=0), filled)
        start, end = (self._constant(np.array([n])) for n in (0, number))
        ends = self._node("Slice", self._reshaped(ends, -1, 1), start, end, start)
        return self._node("Add", within, self._node("Sub", ends, totals))

    def _reshaped(self, name: str, *shape: int) -> str:
        return self._node("Reshape", name, self._constant(np.array(shape, np.int64)))

    def _digits(self, symbols: np.ndarray, base: int) -> tuple[str, int]:
        """Symbols below `base` in words, decoded to int32 `[N]`, and N, which fills the last word."""
        dtype, digits = words_of(base)
        symbols, powers = np.pad(symbols, (0, -symbols.size % digits)), base ** np.arange(digits)
        words = (symbols.reshape(-1, digits) * powers).sum(1).astype(dtype)[:, None]
        column = self._cast(self._constant(words), INT32)
        shifted = self._node("Div", column, self._constant(powers.astype(np.int32)))
        digit = self._node("Mod", shifted, self._constant(np.array(base, np.int32)))
        return self._reshaped(digit, -1), symbols.size

    def _cast(self, name: str, to: int = FLOAT32) -> str:
        return self._node("Cast", name, to=to)

    def _constant(self, values: np.ndarray) -> str:
        """The name of an initializer that holds `values`; equal ones are stored once."""
        from onnx import numpy_helper

        key = str(values.dtype), values.shape, values.tobytes()
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(values, f"c{len(self._constants)}")
        return self._constants[key].name

    def _node(self, operation: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        from onnx import helper

        outputs = outputs or [f"{operation}:{len(self._nodes)}"]
        self._nodes.append(helper.make_node(operation, inputs, outputs, **attributes))
        return outputs[0]
