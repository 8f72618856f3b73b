"""Lossless codes of a network's values: ternary symbols, and 16-bit numbers.

A symbol is 0 for a zero weight, 1 for w_p and 2 for -w_n. A layer's symbols become bytes in one of three
ways, and these go through a compressor; the shortest result is kept:

- Five symbols a byte, a base-3 number (3**5 = 243). This bounds the size, whatever the symbols are.
- Three symbols a byte: a row of a 3x3 kernel, whose weights resemble each other. A Huffman code of 27 values
  pays for its table even in a small layer.
- One byte a nonzero weight: its sign, and the gap before it. For very sparse layers, where a Huffman code of
  base-3 numbers would spend a whole bit on every byte of zeros.
"""

import lzma
import zlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np

RAW, DEFLATE, LZMA = "raw", "deflate", "LZMA"
DEFLATE_WINDOW = -15  # 32 KB; negative: no header and no checksum around the stream
LZMA_FILTER = {
    "id": lzma.FILTER_LZMA1,
    "dict_size": 2**20,
    # symbols are no text: a byte depends neither on its position nor on the byte before
    "lc": 0,
    "lp": 0,
    "pb": 0,
    # long matches are rare, and short ones cost more than they save: look for the nearest only
    "mf": lzma.MF_HC3,
    "depth": 1,
}
GAPS = 0  # in the place of a number of digits
LONGEST_GAP = 127  # zeros in one byte, 254; a nonzero weight behind g < 127 zeros is 2 * g + (symbol - 1)


class Coder(NamedTuple):
    """Base-3 numbers of so many digits (or GAPS), one a byte, then a compressor."""

    digits: int
    compressor: str

    def __str__(self) -> str:
        return f"{f'{self.digits} a byte' if self.digits else 'gaps'}, {self.compressor}"


# Files hold positions in this tuple.
CODERS = (Coder(5, RAW), Coder(5, LZMA), Coder(5, DEFLATE), Coder(3, DEFLATE), Coder(GAPS, DEFLATE))


def encode_symbols(symbols: np.ndarray) -> tuple[int, bytes]:
    """The shortest code of uint8 `[N]` in {0, 1, 2}: the coder's position in CODERS, and the bytes.

    Never more than N / 5 bytes, rounded up; two bit masks take N / 4.
    """
    packed = {digits: pack(symbols, digits).tobytes() for digits in {coder.digits for coder in CODERS}}
    codes = [compress(coder.compressor, packed[coder.digits]) for coder in CODERS]
    position = min(range(len(CODERS)), key=lambda i: len(codes[i]))
    return position, codes[position]


def decode_symbols(position: int, code: bytes, size: int) -> np.ndarray:
    """The symbols, uint8 `[size]`, that `encode_symbols` coded; ValueError if they are not so many."""
    if position >= len(CODERS):
        raise ValueError(f"there is no coder {position}")
    coder = CODERS[position]
    return unpack(decompress(coder.compressor, code, limit=size), coder.digits, size)


def entropy_bytes(symbols: np.ndarray) -> float:
    """First-order entropy of N symbols in bytes: N * H / 8, with H in bits a symbol."""
    counts = np.bincount(symbols, minlength=3)
    counts = counts[counts > 0]
    return float((counts * np.log2(symbols.size / counts)).sum() / 8)


def pack(symbols: np.ndarray, digits: int) -> np.ndarray:
    """Symbols as uint8 numbers: `digits` a number, the first most significant, zeros filling up; or GAPS."""
    if digits == GAPS:
        return _pack_gaps(symbols)
    rows = np.zeros((-(-symbols.size // digits), digits), np.uint8)
    rows.reshape(-1)[: symbols.size] = symbols
    numbers = rows[:, 0].copy()
    for i in range(1, digits):
        numbers *= 3
        numbers += rows[:, i]
    return numbers


def unpack(numbers: np.ndarray, digits: int, size: int) -> np.ndarray:
    """The symbols, uint8 `[size]`, that `pack` made numbers of; ValueError if they are not so many."""
    if digits == GAPS:
        return _unpack_gaps(numbers, size)
    if numbers.size != -(-size // digits) or (numbers >= 3**digits).any():
        raise ValueError(f"symbols that are not {size} base-3 digits")
    symbols = _digits_of_numbers(digits)[numbers].reshape(-1)
    if symbols[size:].any():
        raise ValueError(f"more than {size} symbols")
    return symbols[:size]


@cache
def _digits_of_numbers(digits: int) -> np.ndarray:
    """The digits of every number: uint8 `[3**digits, digits]`."""
    return np.indices((3,) * digits, np.uint8).reshape(digits, -1).T.copy()


def _pack_gaps(symbols: np.ndarray) -> np.ndarray:
    places = np.flatnonzero(symbols)
    long, short = np.divmod(np.diff(places, prepend=-1) - 1, LONGEST_GAP)
    numbers = np.full(places.size + long.sum(), 2 * LONGEST_GAP, np.uint8)
    numbers[np.cumsum(long + 1) - 1] = 2 * short + symbols[places] - 1
    return numbers


def _unpack_gaps(numbers: np.ndarray, size: int) -> np.ndarray:
    is_weight = numbers < 2 * LONGEST_GAP
    ends = np.cumsum(numbers // 2 + is_weight, dtype=np.int64)
    if (numbers > 2 * LONGEST_GAP).any() or (ends[-1:] > size).any():
        raise ValueError(f"gaps that are not among {size} symbols")
    symbols = np.zeros(size, np.uint8)
    symbols[ends[is_weight] - 1] = numbers[is_weight] % 2 + 1
    return symbols


def encode_halves(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Float16 `[N]` as its deflated high bytes, and its low bytes, uint8 `[N]`.

    A high byte holds sign, exponent and two bits of the mantissa, which are far from equally frequent.
    """
    low, high = values.astype("<f2").view(np.uint8).reshape(-1, 2).T
    return compress(DEFLATE, high.tobytes()), low.copy()


def decode_halves(high: bytes, low: np.ndarray) -> np.ndarray:
    """The float16 `[N]` that `encode_halves` took apart; ValueError if there are not N high bytes."""
    high_bytes = decompress(DEFLATE, high, limit=low.size)
    if high_bytes.size != low.size:
        raise ValueError(f"{high_bytes.size} high bytes for {low.size} low ones")
    return np.stack([low, high_bytes], axis=1).reshape(-1).view("<f2").astype(np.float16)


def compress(compressor: str, data: bytes) -> bytes:
    """The shortest that `compressor` can make of `data`."""
    if compressor == LZMA:
        return lzma.compress(data, lzma.FORMAT_RAW, filters=[LZMA_FILTER])
    if compressor == DEFLATE:  # other repeats than runs are chance: looking for them costs time and bytes
        return min(_deflate(data, zlib.Z_HUFFMAN_ONLY), _deflate(data, zlib.Z_RLE), key=len)
    return data


def decompress(compressor: str, code: bytes, limit: int) -> np.ndarray:
    """What `compress` made `code` of, uint8 `[N]`; ValueError if it is damaged, or N is above `limit`.

    At most `limit` + 1 bytes are made, whatever `code` would expand to.
    """
    if compressor == RAW:
        return np.frombuffer(code, np.uint8)
    stream: Any  # both kinds have `decompress`, `eof` and `unused_data`
    try:
        if compressor == LZMA:
            stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[LZMA_FILTER])
        else:
            stream = zlib.decompressobj(DEFLATE_WINDOW)
        data = stream.decompress(code, limit + 1)
    except (zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"bad {compressor} data: {error}") from None
    if len(data) > limit or not stream.eof or stream.unused_data:
        raise ValueError(f"{compressor} data that do not end within {limit} bytes")
    return np.frombuffer(data, np.uint8)


def _deflate(data: bytes, strategy: int) -> bytes:
    stream = zlib.compressobj(wbits=DEFLATE_WINDOW, memLevel=9, strategy=strategy)
    return stream.compress(data) + stream.flush()
