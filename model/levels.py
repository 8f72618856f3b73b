"""Few distinct values in a tensor: grids of two steps, of which ternary weights are the least, and codebooks."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST_LEVELS = 256
MOST_STEPS = 127  # on either side of zero: 8 bits


@dataclass(frozen=True)
class Levels:
    """The distinct values of a tensor, and which of them each of its elements is.

    Attributes:
        values: `[L]`, at most MOST_LEVELS: zero, the least positive one, the least negative one, the next positive
            one, and so on; of a grid 0, w_p, -w_n, 2 w_p, -2 w_n, ...
        symbols: uint8 `[N]`, positions in `values`.
        steps: w_p and w_n, `[2]`, of a grid, 0 for a side without values; None for any other codebook.
    """

    values: np.ndarray
    symbols: np.ndarray
    steps: np.ndarray | None


def grid(steps: np.ndarray, number: int) -> np.ndarray:
    """The levels of a grid, `[2 * number + 1]`: zero, then k * w_p and -k * w_n for each k from 1 to `number`."""
    levels = np.zeros(2 * number + 1, steps.dtype)
    levels[1:] = (np.arange(1, number + 1, dtype=steps.dtype)[:, None] * steps * (1, -1)).reshape(-1)
    return levels


def numbers(tensor: Tensor) -> np.ndarray:
    """The elements of a tensor on the CPU, `[N]`; those of types that numpy lacks as float32, which holds them all."""
    known = not tensor.is_floating_point() or tensor.dtype in (torch.float64, torch.float32)
    return (tensor if known else tensor.float()).detach().reshape(-1).numpy()


def levels_of(values: np.ndarray) -> Levels | None:
    """The levels of values `[N]`; None if these are complex, or have none, more than MOST_LEVELS, or NaN among them."""
    few = np.unique(values[:: max(1, values.size // 4096)])  # tells at once that a dense layer has more
    if not 0 < few.size <= MOST_LEVELS or values.dtype.kind == "c":
        return None
    distinct = np.unique(np.where(values, values, np.zeros((), values.dtype)))  # there is no negative zero
    if distinct.size > MOST_LEVELS or np.isnan(distinct[-1]):
        return None
    if found := grid_of(distinct):
        pair, number = found
        levels = grid(pair, number)
    else:
        places = np.arange(distinct.size) - distinct.searchsorted(np.zeros((), distinct.dtype))
        pair, levels = None, distinct[np.lexsort((places < 0, np.abs(places)))]
    order = np.argsort(levels, kind="stable")
    symbols = order[levels.searchsorted(values, sorter=order)].astype(np.uint8)
    return Levels(levels, symbols, pair)


def grid_of(distinct: np.ndarray) -> tuple[np.ndarray, int] | None:
    """The steps `[2]` and the last level's number of the grid that distinct values, sorted, lie on; None if on none."""
    if distinct.dtype.kind != "f":
        return None
    positive, negative = (_step(side[side > 0]) for side in (distinct, -distinct[::-1]))
    if not positive or not negative:
        return None
    return np.array([positive[0], negative[0]], distinct.dtype), max(positive[1], negative[1])


def _step(magnitudes: np.ndarray) -> tuple[float, int] | None:
    """The largest step of which all magnitudes, sorted, are multiples, and the last one's number; None if none is."""
    if not magnitudes.size:
        return 0.0, 0
    counts = np.arange(magnitudes.size, MOST_STEPS + 1, dtype=magnitudes.dtype)
    with np.errstate(all="ignore"):  # infinite values are multiples of nothing
        step = magnitudes[-1] / counts
        near = np.stack([step, np.nextafter(step, 0 * step), np.nextafter(step, np.inf * step)], axis=1).reshape(-1, 1)
        multiples = np.rint(magnitudes / near)
        found = ((multiples * near == magnitudes) & (multiples <= MOST_STEPS)).all(1)
    if not found.any():
        return None
    first = int(found.argmax())
    return near[first, 0], int(multiples[first, -1])


def is_quantized(tensor: Tensor) -> bool:
    """Whether a weight of two dimensions or more holds a grid of levels, or few enough others to be a codebook.

    A grid is k * w_p above zero and -k * w_n below, of whole numbers k up to MOST_STEPS; a ternary weight is one.
    """
    levels = levels_of(numbers(tensor)) if tensor.ndim > 1 else None
    return levels is not None and (levels.steps is not None or is_codebook(levels.values.size, tensor.numel()))


def bits_of_grid(tensor: Tensor) -> int:
    """The bits, 2 to 8, of a grid that holds a tensor's values, neither all equal nor on one side; 0 if none does."""
    levels = levels_of(numbers(tensor.cpu()))
    if levels is None or levels.steps is None or not levels.steps.all():
        return 0
    return (levels.values.size // 2).bit_length() + 1


def is_codebook(levels: int, numel: int) -> bool:
    """Whether `levels` distinct values among `numel` are few enough to have been chosen."""
    return levels <= MOST_LEVELS and 8 * levels <= numel
