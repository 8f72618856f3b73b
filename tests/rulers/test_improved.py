"""The improved ruler: adder trees and storage formats against what they count, and ResNet-20 by hand."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.tallies import WIDTHS, lines, total
from model import build
from model.selection import ternary_candidates
from rulers import challenge, improved
from rulers.storage import TERNARY, Code, Matrix, challenge_formats, improved_formats, smallest
from rulers.tally import Widths

# --------------------------------------------------------------------------------------------- the adder tree


def additions(values: int, width: int) -> list[int]:
    """The width of every addition of a tree that is built: a list of values that pairs up, level by level."""
    level, widths = ["value"] * values, []
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        widths += [min(width, 32) for pair in pairs if len(pair) == 2]
        level = ["sum" if len(pair) == 2 else "value" for pair in pairs]
        width += 1
    return widths


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=8), st.integers(1, 32))
def test_tree_bits_are_those_of_a_tree_that_is_built(summands, b):
    expected = [additions(m, b) for m in summands]
    assert improved.tree_bits(torch.tensor(summands), b).tolist() == [sum(widths) for widths in expected]
    assert [len(widths) for widths in expected] == [max(m - 1, 0) for m in summands]
    for m, widths in zip(summands, expected, strict=True):  # the last level of the tree
        assert max(widths, default=32) == (min(b + math.ceil(math.log2(m)) - 1, 32) if m > 1 else 32)


@pytest.mark.parametrize(
    ("summands", "b", "bits"),
    [(0, 16, 0), (1, 16, 0), (2, 16, 16), (3, 16, 33), (5, 16, 2 * 16 + 17 + 18), (8, 31, 4 * 31 + 3 * 32)],
)
def test_small_trees(summands, b, bits):
    assert improved.tree_bits(torch.tensor([summands]), b).tolist() == [bits]


# ------------------------------------------------------------------------------------------- storage formats


def bits_of(array: list[int]) -> int:
    """The width that the largest of some unsigned integers needs."""
    return max(array, default=0).bit_length()


def rows_of(starts: list[int], columns: list[int]) -> list[list[int]]:
    return [columns[start:end] for start, end in pairwise(starts)]


@st.composite
def matrices(draw, values) -> list[list[float]]:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    return draw(st.lists(st.lists(values, min_size=columns, max_size=columns), min_size=rows, max_size=rows))


def seen(matrix: list[list[float]], code: Code | None) -> Matrix:
    numel, nonzero = len(matrix) * len(matrix[0]), sum(value != 0 for row in matrix for value in row)
    return Matrix(len(matrix), len(matrix[0]), numel, nonzero, code)


@given(matrices(st.sampled_from([0.0, 0.0, 0.5, -0.25])), st.integers(1, 32))
def test_ternary_formats_hold_the_matrix(matrix, b):
    """Encode, decode, and add up the arrays' bits."""
    formats = improved_formats(seen(matrix, TERNARY), b)
    flat = [value for row in matrix for value in row]

    two_masks = 2 * len(flat) + 2 * b
    assert formats["mask and signs"] <= two_masks

    mask, signs = [value != 0 for value in flat], [value > 0 for value in flat if value]
    following = iter(signs)
    assert [(0.5 if next(following) else -0.25) if there else 0 for there in mask] == flat
    assert formats["mask and signs"] == len(mask) + len(signs) + 2 * b

    columns, starts = [], [0]
    for row in matrix:
        columns += [column for column, value in enumerate(row) if value]
        starts.append(len(columns))
    following = iter(signs)
    decoded = [[0.0] * len(matrix[0]) for _ in matrix]
    for row, there in zip(decoded, rows_of(starts, columns), strict=True):
        for column in there:
            row[column] = 0.5 if next(following) else -0.25
    assert decoded == matrix
    width = max(b, (len(matrix[0]) - 1).bit_length())
    assert width >= bits_of(columns)
    pointer = max(b, bits_of(starts))
    assert formats["CSR"] == len(signs) + len(columns) * width + len(starts) * pointer + 2 * b

    decoded, total_columns, total_starts = [[0.0] * len(matrix[0]) for _ in matrix], 0, 0
    for value in (0.5, -0.25):
        columns, starts = [], [0]
        for row in matrix:
            columns += [column for column, entry in enumerate(row) if entry == value]
            starts.append(len(columns))
        for row, there in zip(decoded, rows_of(starts, columns), strict=True):
            for column in there:
                row[column] = value
        total_columns, total_starts = total_columns + len(columns), total_starts + len(starts)
    assert decoded == matrix
    assert formats["CER"] == total_columns * width + total_starts * pointer + 2 * b


@given(matrices(st.sampled_from([0.0, 1.0, 2.0, -3.0])), st.integers(1, 32))
def test_other_formats(matrix, b):
    kind = seen(matrix, None)
    assert challenge_formats(kind, b) == {"dense": kind.numel * b, "mask": kind.numel + kind.nonzero * b}
    formats = improved_formats(kind, b)
    assert set(formats) == {"dense", "mask", "CSR"}
    column, start = max(b, (kind.columns - 1).bit_length()), max(b, kind.nonzero.bit_length())
    assert formats["CSR"] == kind.nonzero * (b + column) + (kind.rows + 1) * start


@pytest.mark.parametrize(
    ("nonzero", "b", "name", "bits"),
    [
        (36864, 16, "mask and signs", 2 * 36864 + 32),
        (13000, 16, "mask and signs", 36864 + 13000 + 32),
        (1500, 16, "CER", 1500 * 16 + 2 * 65 * 16 + 32),
        (500, 16, "CSR", 500 * 17 + 65 * 16 + 32),
        (0, 16, "CSR", 65 * 16 + 32),
        (30000, 1, "dense", 36864),
    ],
)
def test_the_smallest_format_is_taken(nonzero, b, name, bits):
    """A ternary layer of 64 filters of 64 x 3 x 3, from dense to empty."""
    assert smallest(improved_formats(Matrix(64, 576, 36864, nonzero, TERNARY), b)) == (name, bits)


def test_indices_are_wider_where_b_bits_do_not_suffice():
    formats = improved_formats(Matrix(2, 70_000, 140_000, 100_000, TERNARY), 16)
    assert formats["CSR"] == 100_000 * (1 + 17) + 3 * 17 + 32


# --------------------------------------------------------------------------------------------------- networks


def ternary(layer: nn.Module, threshold: float) -> nn.Module:
    torch.manual_seed(0)
    values = torch.randn_like(layer.weight)
    layer.weight.data = 0.3 * (values > threshold) - 0.2 * (values < -threshold)
    return layer


def test_ternary_convolution():
    conv = ternary(nn.Conv2d(8, 4, 3), 1.0)
    tally = improved.count(conv, (8, 5, 5), WIDTHS)
    (line,) = lines(tally).values()
    summands = [int(filter.count_nonzero()) for filter in conv.weight]
    tree = 9 * sum(sum(additions(m, 16)) for m in summands)
    assert line.mults == 2 * 4 * 9
    assert line.adds == sum(summands) * 9  # the sums and the bias
    assert (line.tree_adds, line.tree_bits) == ((sum(summands) - 4) * 9, tree)
    assert line.bits == 288 + sum(summands) + 2 * 16 + 4 * 16
    assert tally.total_mflop == pytest.approx((line.mults * 16 + 4 * 9 * 32 + tree) / 32e6)


def test_layers_that_are_not_ternary_have_no_tree():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    tallies = [ruler.count(network, 8, WIDTHS) for ruler in (challenge, improved)]
    assert total(tallies[0]) == total(tallies[1])
    assert tallies[0].total_mflop == tallies[1].total_mflop
    assert [tally.ruler for tally in tallies] == ["challenge", "improved"]


def test_very_sparse_layer_is_stored_by_its_indices():
    conv = ternary(nn.Conv2d(64, 64, 3, bias=False), 2.6)
    (line,) = lines(improved.count(conv, (64, 4, 4), WIDTHS)).values()
    nonzero = int(conv.weight.count_nonzero())
    assert line.note == "CSR"
    assert line.bits == nonzero * 17 + 65 * 16 + 32


def ternary_resnet20(seed: int, threshold: float) -> nn.Module:
    torch.manual_seed(seed)
    network = build({"name": "resnet20"})
    for name in ternary_candidates(network, "resnet20"):
        weight = network.get_parameter(name).data
        t = threshold * weight.std()
        weight.copy_(0.21 * (weight > t) - 0.17 * (weight < -t))
    return network


@pytest.mark.parametrize("threshold", [0.6, 0.93])
def test_resnet20_by_hand(threshold):
    """45% and 65% zeros, none of them a dead channel: every layer is stored as a mask and signs."""
    network = ternary_resnet20(0, threshold)
    tally = improved.count(network, 32, WIDTHS)
    weights = [network.get_parameter(name) for name in ternary_candidates(network, "resnet20")]
    area = {16: 32 * 32, 32: 16 * 16, 64: 8 * 8}

    bits = sum(w.numel() + int(w.count_nonzero()) + 2 * 16 for w in weights)
    bits += (432 + 640 + 10) * 16 + 688 * 16  # the first and the last layer, a bias for each channel
    assert total(tally)[0] == bits

    def tree(weight: Tensor) -> int:
        return sum(sum(additions(int(filter.count_nonzero()), 16)) for filter in weight) * area[len(weight)]

    outputs = 16 * 1024 + sum(len(w) * area[len(w)] for w in weights)
    first, linear, pool = 27 * 16 * 1024, 640, 64 * 64
    skips = 3 * (16 * 1024 + 32 * 256 + 64 * 64)
    mults = first + 2 * (outputs - 16 * 1024) + outputs + 64 + linear
    adds = first + (outputs - 16 * 1024) + skips + pool - 64 + linear
    mflop = (mults * 16 + adds * 32 + sum(map(tree, weights))) / 32e6
    assert tally.total_mflop == pytest.approx(mflop, rel=1e-12)
    assert tally.uncounted == []


@pytest.mark.parametrize("value", [8, 16, 32])
def test_improved_is_never_dearer_than_challenge(value):
    before = math.inf, math.inf
    for threshold in (0.0, 0.6, 1.5, 3.0):
        network = ternary_resnet20(1, threshold)
        widths = Widths(value, 16, 32)
        dearer, cheaper = challenge.count(network, 32, widths), improved.count(network, 32, widths)
        assert cheaper.total_scoring_params <= dearer.total_scoring_params
        assert cheaper.total_mflop <= dearer.total_mflop
        assert total(cheaper)[1:] == total(dearer)[1:]  # the same operations, in other widths
        after = cheaper.total_scoring_params, cheaper.total_mflop
        assert after[0] <= before[0] and after[1] <= before[1]  # nor do more zeros cost more
        before = after
