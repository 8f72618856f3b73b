"""Layers with few distinct values, wherever they come from: grids of 2 to 8 bits, and codebooks."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers.tallies import counted, lines
from rulers import improved
from rulers.challenge import count
from rulers.improved import tree_bits
from rulers.tally import Widths


@given(st.integers(3, 8), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_layer_on_a_grid(bits, inputs, seed):
    """Symbols and two steps are stored; an output multiplies each level in use, or each weight, by what it sums."""
    numbers = np.random.default_rng(seed)
    most = 2 ** (bits - 1) - 1
    levels = numbers.integers(-most, most + 1, (8, inputs)) * numbers.integers(0, 2, (8, inputs))
    levels[0, 0], levels[-1] = most, [1] * inputs  # the outermost level tells the bits
    linear = nn.Linear(inputs, 8, bias=False)
    w_p, w_n = np.float32(0.03), np.float32(0.007)
    linear.weight.data = torch.from_numpy(levels.astype(np.float32) * np.where(levels > 0, w_p, w_n))
    (line,) = lines(count(linear, (inputs,), Widths(16, 16, 32))).values()
    filters = (levels != 0).sum(1)
    in_use, nonzero, numel = len(set(levels[levels != 0])), int(filters.sum()), levels.size
    formats = {"dense": 16 * numel, "mask": numel + 16 * nonzero}
    formats |= {f"{bits} bit": bits * numel + 32, f"mask and {bits} bit": numel + bits * nonzero + 32}
    adds = int((filters - 1).clip(0).sum())
    assert counted(line) == (min(formats.values()), int(filters.clip(max=in_use).sum()), adds)
    assert formats[line.note] == line.bits


def test_layer_with_a_codebook():
    """Five values that are no multiples of one step, as k-means finds them, and zero: their symbols and they."""
    values = torch.tensor([0.0, 0.113, 0.2091, 0.3717, -0.0871, -0.3319])
    linear = nn.Linear(40, 3, bias=False)
    linear.weight.data = values.repeat(20).view(3, 40)
    (line,) = lines(count(linear, (40,), Widths(16, 16, 32))).values()
    nonzero = [int(row.count_nonzero()) for row in linear.weight]
    assert counted(line) == (3 * 120 + 5 * 16, 3 * 5, sum(nonzero) - 3)
    assert line.note == "5 values"


def test_few_weights_are_no_codebook():
    """All values of a small layer differ: nothing was quantized."""
    linear = nn.Linear(8, 4, bias=False)
    (line,) = lines(count(linear, (8,), Widths(16, 16, 32))).values()
    assert counted(line) == (32 * 16, 32, 28)
    (line,) = lines(improved.count(linear, (8,), Widths(16, 16, 32))).values()
    assert line.tree_adds == 0


def test_adder_trees_of_a_grid():
    """As in a ternary layer: over all weights of a filter that are not zero, beginning at 16 bit."""
    linear = nn.Linear(50, 2, bias=False)
    linear.weight.data = torch.arange(100.0).view(2, 50).remainder(8) * 0.25
    (line,) = lines(improved.count(linear, (50,), Widths(16, 16, 32))).values()
    summands = linear.weight.count_nonzero(dim=1)
    assert (line.mults, line.tree_adds) == (14, int(summands.sum()) - 2)
    assert line.tree_bits == int(tree_bits(summands, 16).sum())
