"""The codes of symbols: exact round trips, near their entropy, and nothing else accepted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from helpers.packed_files import (
    allocating_less_than,
)
from model_scoring import coding, rans

quick = settings(max_examples=100, deadline=None)
symbol_arrays = npst.arrays(np.uint8, st.integers(0, 300), elements=st.integers(0, 2))


# ------------------------------------------------------------------------------------------ symbols a byte


def drawn_symbols(seed: int, size: int, zeros: float) -> np.ndarray:
    shares = [zeros, (1 - zeros) / 2, (1 - zeros) / 2]
    return np.random.default_rng(seed).choice(3, size, p=shares).astype(np.uint8)


def test_pack_writes_base_3_numbers_and_fills_up_with_zeros() -> None:
    assert coding.pack(np.array([1, 2, 0, 1, 2], np.uint8), 3).tolist() == [1 * 9 + 2 * 3 + 0, 1 * 9 + 2 * 3]
    assert coding.pack(np.array([2, 2, 2, 2, 2], np.uint8), 5).tolist() == [242]
    assert coding.pack(np.empty(0, np.uint8), 5).tolist() == []


@pytest.mark.parametrize(
    ("symbols", "numbers"),
    [
        ([], []),
        ([0, 0], []),
        ([1, 2, 0, 0, 1, 0], [2 * 0 + 0, 2 * 0 + 1, 2 * 2 + 0]),
        ([0] * 126 + [2], [2 * 126 + 1]),
        ([0] * 127 + [1], [254, 0]),
        ([0] * 300 + [2, 1], [254, 254, 2 * 46 + 1, 0]),
    ],
)
def test_pack_writes_gaps(symbols: list[int], numbers: list[int]) -> None:
    packed = coding.pack(np.array(symbols, np.uint8), coding.GAPS)
    assert packed.dtype == np.uint8 and packed.tolist() == numbers
    assert coding.unpack(packed, coding.GAPS, len(symbols)).tolist() == symbols


@quick
@given(symbols=symbol_arrays, digits=st.integers(1, 5), levels=st.integers(3, 256))
def test_unpack_restores_symbols(symbols: np.ndarray, digits: int, levels: int) -> None:
    digits = min(digits, coding._digits(coding.FULL, levels))
    numbers = coding.pack(symbols, digits, levels)
    assert numbers.dtype == np.uint8 and numbers.size == -(-symbols.size // digits)
    assert np.array_equal(coding.unpack(numbers, digits, symbols.size, levels), symbols)


def test_a_byte_holds_as_many_symbols_as_it_can() -> None:
    assert [coding._digits(coding.FULL, levels) for levels in (2, 3, 4, 6, 7, 15, 16, 17, 255, 256)] == [
        *(8, 5, 4, 3, 2, 2, 2, 1, 1, 1)
    ]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), zeros=st.floats(0.9, 1), size=st.integers(0, 2000))
def test_unpack_restores_gaps(seed: int, zeros: float, size: int) -> None:
    symbols = drawn_symbols(seed, size, zeros)
    assert np.array_equal(coding.unpack(coding.pack(symbols, coding.GAPS), coding.GAPS, size), symbols)


@pytest.mark.parametrize(
    ("numbers", "digits", "size"),
    [
        ([242], 5, 6),
        ([242, 0], 5, 5),
        ([243], 5, 5),
        ([255], 5, 5),
        ([1], 5, 4),
        ([27], 3, 3),
        ([], 5, 1),
        ([0], 5, 0),
        ([255], coding.GAPS, 200),
        ([4], coding.GAPS, 2),
        ([254], coding.GAPS, 126),
        ([0, 0, 0], coding.GAPS, 2),
        ([0], coding.GAPS, 0),
    ],
)
def test_unpack_refuses_what_is_not_so_many_symbols(numbers: list[int], digits: int, size: int) -> None:
    with pytest.raises(ValueError, match="symbols"):
        coding.unpack(np.array(numbers, np.uint8), digits, size)


# ---------------------------------------------------------------------------------------- codes of symbols


def coded(*parts: np.ndarray, levels: int = 3) -> tuple[np.ndarray, int]:
    """What becomes of layers' symbols, each layer under its shortest code, and the bytes that all of it takes."""
    ranged, restored, number = [], {}, 0
    for i, symbols in enumerate(parts):
        position, code, size = coding.encode_symbols(symbols, levels)
        if (order := coding.order_of(position)) is None:
            restored[i] = coding.decode_symbols(position, code, symbols.size, levels)
            number += len(code)
        else:
            ranged.append((i, rans.Layer(symbols.size, levels, order), size))
    if ranged:
        places, layers, sizes = zip(*ranged, strict=True)
        depths, words, lanes = rans.encode(np.concatenate([parts[i] for i in places]), layers, sum(sizes))
        ends = np.cumsum([layer.size for layer in layers])
        restored |= zip(places, np.split(rans.decode(layers, depths, words, lanes), ends[:-1]), strict=True)
        number += words.nbytes + min(len(coding.compress(c, depths.tobytes())) for c in coding.COMPRESSORS)
    return np.concatenate([restored[i] for i in range(len(parts))]), number


@quick
@given(symbols=symbol_arrays)
def test_any_ternary_symbols_are_restored_and_never_take_more_than_two_masks(symbols: np.ndarray) -> None:
    restored, number = coded(symbols)
    assert np.array_equal(restored, symbols)
    assert number <= -(-symbols.size // 5) + 12 and coding.encode_symbols(symbols)[2] <= -(-symbols.size // 5)


@st.composite
def layers_of_symbols(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """The symbols of a layer of any width: bell-shaped, as weights are, uniform, or nearly all zero."""
    levels, size = draw(st.integers(1, 256)), draw(st.integers(1, 10_000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape, spread = draw(st.sampled_from(["bell", "uniform", "zeros"])), draw(st.floats(0.01, 1))
    if shape == "bell":
        symbols = np.abs(np.rint(rng.standard_normal(size) * spread * levels / 2)).clip(max=levels - 1)
    else:
        symbols = rng.integers(0, levels, size) * (rng.random(size) < (1 if shape == "uniform" else spread / 10))
    return symbols.astype(np.uint8), levels


@settings(max_examples=60, deadline=None)
@given(layer=layers_of_symbols(), repeats=st.integers(1, 3))
def test_symbols_of_any_width_take_their_entropy_and_3_percent_at_most(
    layer: tuple[np.ndarray, int], repeats: int
) -> None:
    symbols, levels = np.tile(layer[0], repeats), layer[1]
    restored, number = coded(symbols, levels=levels)
    assert np.array_equal(restored, symbols)
    assert number <= 1.03 * coding.entropy_bytes(symbols) + 16 + levels + symbols.size / 10_000
    assert coded(symbols, levels=levels)[1] == number


@settings(max_examples=20, deadline=None)
@given(data=st.data(), number=st.integers(2, 9))
def test_layers_are_range_coded_together(data: st.DataObject, number: int) -> None:
    parts = [data.draw(layers_of_symbols()) for _ in range(number)]
    layers = [rans.Layer(s.size, max(levels, 2), data.draw(st.sampled_from(coding.ORDERS))) for s, levels in parts]
    symbols = np.concatenate([s for s, _ in parts])
    depths, words, lanes = rans.encode(symbols, layers, data.draw(st.integers(0, 200_000)))
    assert np.array_equal(rans.decode(layers, depths, words, lanes), symbols)
    again = rans.encode(symbols, layers, 4096 * lanes)
    assert np.array_equal(again[0], depths) and np.array_equal(again[1], words)


def test_a_bell_of_8_bits_takes_its_entropy_and_half_a_percent() -> None:
    bell = np.random.default_rng(0).standard_normal((4, 250_000)) * 40
    parts = np.abs(np.rint(bell)).clip(max=254).astype(np.uint8)
    restored, number = coded(*parts, levels=255)
    assert np.array_equal(restored, parts.reshape(-1))
    assert number < 1.005 * sum(map(coding.entropy_bytes, parts))


@pytest.mark.parametrize("zeros", [0.4, 0.7, 0.95, 0.999])
def test_independent_symbols_take_about_their_entropy(zeros: float) -> None:
    symbols = drawn_symbols(0, 100_000, zeros)
    assert coded(symbols)[1] < 1.01 * coding.entropy_bytes(symbols) + 16


def test_rows_that_resemble_each_other_take_less_than_the_entropy_of_their_symbols() -> None:
    rows = np.repeat(drawn_symbols(0, 10_000, 0.6), 3)
    position, code, _ = coding.encode_symbols(rows)
    assert coding.CODERS[position] == coding.Coder(3, coding.DEFLATE)
    assert len(code) < 0.4 * coding.entropy_bytes(rows)


def test_kernels_whose_neighbours_resemble_each_other_take_less_than_the_entropy_of_their_symbols() -> None:
    signs = np.repeat(drawn_symbols(0, 20_000, 0.5), 9)
    noise = drawn_symbols(1, signs.size, 0.5)
    symbols = np.where(noise == 0, signs, noise).astype(np.uint8)
    assert coding.order_of(coding.encode_symbols(symbols)[0]) == 2
    assert coded(symbols)[1] < 0.95 * coding.entropy_bytes(symbols)


@pytest.mark.parametrize(
    ("symbols", "coder"),
    [
        (drawn_symbols(0, 50, 1 / 3), coding.Coder(coding.FULL, coding.RAW)),
        (np.repeat(drawn_symbols(0, 10_000, 0.6), 3), coding.Coder(3, coding.DEFLATE)),
        (np.tile(drawn_symbols(0, 5_000, 0.7), 10), coding.Coder(coding.FULL, coding.LZMA)),
        (np.eye(1, 1_000_000, 50, dtype=np.uint8)[0], coding.Coder(coding.GAPS, coding.DEFLATE)),
        (drawn_symbols(0, 50_000, 0.65), None),
    ],
    ids=["uniform", "rows", "repeated", "one weight", "a large layer"],
)
def test_the_shortest_code_is_taken(symbols: np.ndarray, coder: coding.Coder | None) -> None:
    position, _, size = coding.encode_symbols(symbols)
    assert coding.order_of(position) == (0 if coder is None else None)
    assert coder is None or coding.CODERS[position] == coder
    for digits, compressor in coding.CODERS:
        assert len(coding.compress(compressor, coding.pack(symbols, digits).tobytes())) >= size
    for order in coding.ORDERS:
        assert rans.cost(symbols, rans.Layer(symbols.size, 3, order)) >= size


@pytest.mark.parametrize("zeros", [0.5, 0.9999])
def test_millions_of_weights_are_coded_in_steps_that_numpy_takes_at_once(zeros: float) -> None:
    symbols = drawn_symbols(0, 2_000_000, zeros)
    layer = rans.Layer(symbols.size, 3, 1)
    depths, words, lanes = rans.encode(symbols, [layer], rans.cost(symbols, layer))
    assert symbols.size / lanes <= 2**16 and 6 * lanes < 0.0025 * words.nbytes + 190
    assert np.array_equal(rans.decode([layer], depths, words, lanes), symbols)


def test_probabilities_are_the_same_on_every_machine() -> None:
    exact = 2.0 ** (26 - np.arange(rans.DEEPEST + 1) / 4)
    assert (np.abs(exact % 1 - 0.5) > 1e-4).all()  # no error of the last bits decides how a weight is rounded
    starts = rans._starts([rans.Layer(9, 3, 0)], np.array([0, 2, rans.ABSENT], np.uint8))  # precision 1: 4 to 1
    below = 2**rans.BITS - 3
    assert starts.tolist() == [0, below * 4 // 5 + 1, below + 2, 2**rans.BITS]


@pytest.mark.parametrize(
    "damage",
    [
        lambda words, lanes: (words[:-1], lanes),
        lambda words, lanes: (np.append(words, words[:1]), lanes),
        lambda words, lanes: (words[::-1], lanes),
        lambda words, lanes: (words ^ 1, lanes),
        lambda words, lanes: (words[:0], lanes),
        lambda words, lanes: (words, lanes + 1),
        lambda words, lanes: (words, 0),
        lambda words, lanes: (words, -1),
        lambda words, lanes: (words, 2**62),
        lambda words, lanes: (np.zeros_like(words), lanes),
    ],
    ids=["shorter", "longer", "reversed", "changed", "empty", "one lane more", "no lane", "-1", "absurd", "zeros"],
)
def test_words_of_other_symbols_are_refused(damage: Callable) -> None:
    symbols, layers = drawn_symbols(0, 9_000, 0.6), [rans.Layer(4_000, 3, 1), rans.Layer(5_000, 3, 2)]
    depths, words, lanes = rans.encode(symbols, layers, 1_500)
    with pytest.raises(ValueError, match="words"):
        rans.decode(layers, depths, *damage(words, lanes))


def test_few_words_of_many_symbols_do_not_take_forever() -> None:
    with pytest.raises(ValueError, match="2 words of symbols in 1 lanes"):
        rans.decode([rans.Layer(2**28, 3, 0)], np.zeros(3, np.uint8), np.array([0, 1], np.uint32), 1)


@pytest.mark.parametrize("coder", coding.CODERS, ids=str)
@pytest.mark.parametrize(
    "damage",
    [
        lambda code, size: (code, size - 5),
        lambda code, size: (code, size + 5),
        lambda code, size: (code + b"\0", size),
        lambda code, size: (code[:-1], size),
        lambda code, size: (b"\xff" * len(code), size),
        lambda code, size: (b"", size),
    ],
    ids=["longer", "shorter", "trailing", "truncated", "garbage", "empty"],
)
def test_no_coder_accepts_other_symbols_than_so_many(coder: coding.Coder, damage: Callable) -> None:
    symbols, position = np.full(999, 2, np.uint8), coding.CODERS.index(coder)
    code = coding.compress(coder.compressor, coding.pack(symbols, coder.digits).tobytes())
    assert np.array_equal(coding.decode_symbols(position, code, 999), symbols)
    code, size = damage(code, 999)
    if coder.digits == coding.GAPS and size > 999:  # gaps do not say how many zeros follow the last weight
        assert coding.decode_symbols(position, code, size).tolist() == [*symbols.tolist(), *[0] * 5]
    else:
        with pytest.raises(ValueError, match=r"symbols|data"):
            coding.decode_symbols(position, code, size)


def test_an_unknown_coder_is_refused() -> None:
    with pytest.raises(ValueError, match="no coder 5 of 3 levels"):
        coding.decode_symbols(5, b"\0", 5)
    with pytest.raises(ValueError, match="no coder 4 of 7 levels"):
        coding.decode_symbols(4, b"\0", 5, 7)


@pytest.mark.parametrize("compressor", [coding.DEFLATE, coding.LZMA])
def test_a_decompression_bomb_makes_no_more_than_what_is_asked_for(compressor: str) -> None:
    bomb = coding.compress(compressor, bytes(50_000_000))
    assert len(bomb) < 100_000
    with allocating_less_than(4_000_000), pytest.raises(ValueError, match="within 1000 bytes"):
        coding.decompress(compressor, bomb, 1000)


@pytest.mark.parametrize("compressor", [coding.DEFLATE, coding.LZMA])
def test_decompress_makes_as_much_as_the_limit_and_no_more(compressor: str) -> None:
    code = coding.compress(compressor, b"symbol" * 9)
    assert coding.decompress(compressor, code, 54).tobytes() == b"symbol" * 9
    with pytest.raises(ValueError, match="within 53 bytes"):
        coding.decompress(compressor, code, 53)


def test_entropy_of_symbols() -> None:
    assert coding.entropy_bytes(np.array([0, 0, 1, 2] * 16, np.uint8)) == 64 * 1.5 / 8
    assert coding.entropy_bytes(np.zeros(64, np.uint8)) == 0
