"""The codes of ternary symbols and of 16 bit numbers: exact round trips, and nothing else accepted."""

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
from model_scoring import coding

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
@given(symbols=symbol_arrays, digits=st.integers(1, 5))
def test_unpack_restores_symbols(symbols: np.ndarray, digits: int) -> None:
    numbers = coding.pack(symbols, digits)
    assert numbers.dtype == np.uint8 and numbers.size == -(-symbols.size // digits)
    assert np.array_equal(coding.unpack(numbers, digits, symbols.size), symbols)


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


@quick
@given(symbols=symbol_arrays)
def test_any_symbols_are_restored_and_never_take_more_than_two_masks(symbols: np.ndarray) -> None:
    position, code = coding.encode_symbols(symbols)
    assert np.array_equal(coding.decode_symbols(position, code, symbols.size), symbols)
    assert len(code) <= -(-symbols.size // 5) <= -(-2 * symbols.size // 8)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    zeros=st.floats(0, 1),
    size=st.integers(1, 20_000),
    repeats=st.integers(1, 3),
)
def test_drawn_symbols_are_restored(seed: int, zeros: float, size: int, repeats: int) -> None:
    symbols = np.tile(drawn_symbols(seed, size, zeros), repeats)
    position, code = coding.encode_symbols(symbols)
    assert np.array_equal(coding.decode_symbols(position, code, symbols.size), symbols)
    assert len(code) <= -(-symbols.size // 5)


@pytest.mark.parametrize("zeros", [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98])
def test_independent_symbols_take_about_their_entropy(zeros: float) -> None:
    symbols = drawn_symbols(0, 100_000, zeros)
    assert len(coding.encode_symbols(symbols)[1]) < 1.04 * coding.entropy_bytes(symbols)


def test_rows_that_resemble_each_other_take_less_than_the_entropy_of_their_symbols() -> None:
    rows = np.repeat(drawn_symbols(0, 10_000, 0.6), 3)
    position, code = coding.encode_symbols(rows)
    assert coding.CODERS[position] == coding.Coder(3, coding.DEFLATE)
    assert len(code) < 0.4 * coding.entropy_bytes(rows)


@pytest.mark.parametrize(
    ("symbols", "coder"),
    [
        (drawn_symbols(0, 5_000, 1 / 3), "5 a byte, raw"),
        (drawn_symbols(0, 5_000, 0.8), "3 a byte, deflate"),
        (drawn_symbols(0, 100_000, 0.65), "5 a byte, deflate"),
        (drawn_symbols(0, 50_000, 0.95), "gaps, deflate"),
        (np.tile(drawn_symbols(0, 5_000, 0.7), 10), "5 a byte, LZMA"),
    ],
    ids=["uniform", "a small layer", "a large layer", "a sparse layer", "repeated"],
)
def test_every_coder_is_the_best_for_some_layer(symbols: np.ndarray, coder: str) -> None:
    position, code = coding.encode_symbols(symbols)
    assert str(coding.CODERS[position]) == coder
    for digits, compressor in coding.CODERS:
        assert len(coding.compress(compressor, coding.pack(symbols, digits).tobytes())) >= len(code)


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
        with pytest.raises(ValueError):
            coding.decode_symbols(position, code, size)


def test_an_unknown_coder_is_refused() -> None:
    with pytest.raises(ValueError, match="coder 5"):
        coding.decode_symbols(5, b"\0", 5)


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


# ------------------------------------------------------------------------------------------ 16-bit numbers


@quick
@given(bits=npst.arrays(np.uint16, st.integers(0, 300)))
def test_halves_are_restored_bit_for_bit(bits: np.ndarray) -> None:
    high, low = coding.encode_halves(bits.view(np.float16))
    restored = coding.decode_halves(high, low)
    assert restored.dtype == np.float16 and np.array_equal(restored.view(np.uint16), bits)


def test_halves_of_weights_take_15_percent_less() -> None:
    values = np.random.default_rng(0).standard_normal(20_000).astype(np.float16)
    high, low = coding.encode_halves(values)
    assert low.size == values.size and len(high) + low.size < 0.85 * values.nbytes


def test_halves_need_as_many_high_bytes_as_low_ones() -> None:
    high, low = coding.encode_halves(np.arange(9, dtype=np.float16))
    with pytest.raises(ValueError, match="within 8 bytes"):
        coding.decode_halves(high, low[:-1])
    with pytest.raises(ValueError, match="9 high bytes for 10 low ones"):
        coding.decode_halves(high, np.append(low, low[:1]))
