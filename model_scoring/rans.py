"""An entropy coder of the symbols of a network's layers: interleaved range asymmetric numeral systems (rANS).

After J. Duda, "Asymmetric numeral systems" (arXiv:1311.2540), and F. Giesen, "Interleaved entropy coders"
(arXiv:1402.3392), with states of 64 bits and words of 32. All layers' symbols form one sequence, which is cut into
equal lanes. Every step codes one symbol of each lane, so that numpy does the work, and no layer pays for a coder of its
own.

A symbol's probability depends on its layer and its context: the class of the symbol before it, or of that and of the
third before it, which in a 3x3 kernel are its left and its upper neighbour. There are three classes: 0, odd and even
symbols, which stand for zero, positive and negative weights (`model.levels.Levels`).

Probabilities are kept on a logarithmic scale, a byte each: how far a symbol's count lies below that of the most
frequent one of its context.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BITS = 28  # of a probability
SHIFT, BELOW = np.uint64(BITS), np.uint64(2**BITS - 1)
STATE, WORD = np.uint64(2**32), np.uint64(32)  # states stay between 2**32 and 2**64
LANE_BYTES, LANE_SYMBOLS = 4096, 2**16  # what a lane's code and its symbols come to, at most
ABSENT = 255  # the depth of a symbol that does not occur
DEEPEST = 4 * 26
WEIGHTS = np.zeros(256, np.uint64)  # by depth in quarters of a bit
WEIGHTS[: DEEPEST + 1] = np.rint(2 ** (26 - np.arange(DEEPEST + 1) / 4))
CLASSES, ABOVE = 3, 3


class Layer(NamedTuple):
    """How a layer's symbols are coded.

    Attributes:
        size: their number.
        levels: they are below that, 2 to 256.
        order: how many neighbours make up the context, 0 to 2.
    """

    size: int
    levels: int
    order: int

    @property
    def entries(self) -> int:
        """Number of probabilities: `levels` for each context."""
        return self.levels * CLASSES**self.order

    @property
    def precision(self) -> int:
        """Steps of the logarithmic scale an octave: where there are few symbols to an entry, coarse ones suffice."""
        return 4 if self.size >= 400 * self.entries else 2 if self.size >= 100 * self.entries else 1


def cost(symbols: np.ndarray, layer: Layer) -> float:
    """About how many bytes the symbols of one layer take, with their probabilities."""
    counts = np.bincount(_entries(symbols[:, None], [layer]), minlength=layer.entries)
    starts = _starts([layer], _depths([layer], counts))
    bits = BITS - np.log2(np.diff(starts.astype(np.float64)))
    return float(counts @ bits) / 8 * (1 + 6 / LANE_BYTES) + 6 * symbols.size / LANE_SYMBOLS + 0.4 * layer.entries


def encode(symbols: np.ndarray, layers: Sequence[Layer], byte_count: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Code the layers' symbols, uint8 `[N]`, which take about `byte_count`.

    Returns the depths of the probabilities, uint8 `[entries]`, the words, uint32, and the number of lanes.
    """
    lanes = int(max(1, byte_count // LANE_BYTES, -(-symbols.size // LANE_SYMBOLS)))
    steps = -(-symbols.size // lanes)
    table = np.zeros((lanes, steps), np.uint8)
    table.reshape(-1)[: symbols.size] = symbols
    entries = _entries(table.T, layers)
    depths = _depths(layers, np.bincount(entries, minlength=sum(layer.entries for layer in layers)))
    starts = _starts(layers, depths)
    widths, offsets = np.diff(starts), starts[:-1] & BELOW
    states, words = np.full(lanes, STATE), []
    for step in entries.reshape(steps, lanes)[::-1]:
        width = widths[step]
        full = states >= width << np.uint64(64 - BITS)
        words.append(states[full].astype(np.uint32))
        states[full] >>= WORD
        quotient, rest = np.divmod(states, width)
        states = (quotient << SHIFT) + rest + offsets[step]
    return depths, np.concatenate([states.astype("<u8").view("<u4"), *words[::-1]]), lanes


def decode(layers: Sequence[Layer], depths: np.ndarray, words: np.ndarray, lanes: int) -> np.ndarray:
    """The symbols that `encode` coded; ValueError if the words are not theirs."""
    size = sum(layer.size for layer in layers)
    steps = -(-size // max(lanes, 1))
    if not 0 < 2 * lanes <= words.size or not 0 < steps <= LANE_SYMBOLS:
        raise ValueError(f"{words.size} words of symbols in {lanes} lanes")
    starts, place = _starts(layers, depths), 2 * lanes
    widths = np.diff(starts)
    symbols_of, classes_of = _by_entry(layers)
    words = words.astype(np.uint64)
    states = words[:place:2] + (words[1:place:2] << WORD)
    decoded = np.empty((steps, lanes), np.uint8)
    before: list[np.ndarray] = [np.zeros(lanes, np.uint64)] * ABOVE  # the classes of the last symbols
    for first, last, of_lanes in _stretches(layers, steps, lanes):
        model, left, above = of_lanes
        for step in range(first, last):
            contexts = model + left * before[-1] + above * before[-ABOVE]
            slots = (contexts << SHIFT) + (states & BELOW)
            entries = starts.searchsorted(slots, "right") - 1
            states = widths[entries] * (states >> SHIFT) + slots - starts[entries]
            short = states < STATE
            number = int(np.count_nonzero(short))
            if place + number > words.size:
                raise ValueError("words of symbols end too early")
            states[short] = (states[short] << WORD) + words[place : place + number]
            place += number
            decoded[step] = symbols_of[entries]
            before = [*before[1:], classes_of[entries]]
    if place != words.size or (states != STATE).any():
        raise ValueError("words that are not those of the symbols")
    return decoded.T.reshape(-1)[:size]


def _entries(table: np.ndarray, layers: Sequence[Layer]) -> np.ndarray:
    """Where the probability of each symbol is, `[steps * lanes]`: first by layer, then by context, then by symbol."""
    steps, lanes = table.shape
    sizes = [layer.size for layer in layers]
    sizes[-1] += table.size - sum(sizes)  # what fills up the last lane
    numbers = np.repeat(np.arange(len(layers), dtype=np.int32), sizes).reshape(lanes, steps).T
    levels = np.array([layer.levels for layer in layers], np.int32)
    first = np.cumsum([0, *(layer.entries for layer in layers)], dtype=np.int32)
    left, above = (np.array(weights, np.int32)[numbers] for weights in _weights(layers))
    classes = np.zeros((steps + ABOVE, lanes), np.int32)
    classes[ABOVE:] = _class(table)
    contexts = left * classes[ABOVE - 1 : -1] + above * classes[:-ABOVE]
    return (first[numbers] + contexts * levels[numbers] + table).reshape(-1)


def _weights(layers: Sequence[Layer]) -> tuple[list[int], list[int]]:
    """What the classes of the left and the upper neighbour count in the number of a context, by layer."""
    return [(0, 1, CLASSES)[layer.order] for layer in layers], [int(layer.order == 2) for layer in layers]


def _stretches(layers: Sequence[Layer], steps: int, lanes: int) -> Iterator[tuple[int, int, tuple[np.ndarray, ...]]]:
    """Steps, from one up to another, in which no lane leaves its layer; each lane's first model, and weights."""
    ends = np.cumsum([layer.size for layer in layers])
    models = np.cumsum([0, *(CLASSES**layer.order for layer in layers[:-1])])
    by_layer = [np.array(values, np.uint64) for values in (models, *_weights(layers))]
    cuts = np.unique([0, *(ends % steps), steps])
    for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        numbers = ends.searchsorted(np.arange(lanes) * steps + first, "right").clip(max=len(layers) - 1)
        yield first, last, tuple(values[numbers] for values in by_layer)


def _by_entry(layers: Sequence[Layer]) -> tuple[np.ndarray, np.ndarray]:
    """The symbol, and its class, at each probability."""
    symbols = np.concatenate([np.tile(np.arange(layer.levels), CLASSES**layer.order) for layer in layers])
    return symbols.astype(np.uint8), _class(symbols).astype(np.uint64)


def _class(symbols: np.ndarray) -> np.ndarray:
    return np.where(symbols, 2 - symbols % 2, 0)


def _rows(layers: Sequence[Layer], values: np.ndarray) -> Iterator[tuple[Layer, np.ndarray]]:
    """The values of each layer, `[contexts, levels]`, of values by entry."""
    place = 0
    for layer in layers:
        yield layer, values[place : place + layer.entries].reshape(-1, layer.levels)
        place += layer.entries


def _depths(layers: Sequence[Layer], counts: np.ndarray) -> np.ndarray:
    """How far each count lies below the largest one of its context, in steps of its layer's precision."""
    depths = []
    for layer, rows in _rows(layers, counts):
        octaves = np.log2(np.maximum(rows.max(1, keepdims=True), 1) / np.maximum(rows, 1))
        depths.append(np.where(rows, np.rint(octaves * layer.precision), ABSENT).astype(np.uint8).reshape(-1))
    return np.concatenate(depths)


def _starts(layers: Sequence[Layer], depths: np.ndarray) -> np.ndarray:
    """Where the interval of each entry begins, and the end of the last one: uint64 `[entries + 1]`, increasing.

    The intervals of each context fill 2**BITS; none is empty.
    """
    starts, place = [], 0
    for layer, rows in _rows(layers, depths):
        weights = WEIGHTS[np.minimum(rows.astype(np.int32) * (4 // layer.precision), ABSENT)]
        sums = weights.cumsum(1, dtype=np.uint64)
        least = np.arange(layer.levels, dtype=np.uint64)  # one for each
        within = (sums - weights) * np.uint64(2**BITS - layer.levels) // np.maximum(sums[:, -1:], np.uint64(1)) + least
        firsts = np.arange(place, place + len(rows), dtype=np.uint64) << SHIFT
        starts.append((within + firsts[:, None]).reshape(-1))
        place += len(rows)
    return np.concatenate([*starts, np.array([place], np.uint64) << SHIFT])
