"""Lossless codes of a network's values: ternary symbols, and 16-bit numbers.

A symbol is 0 for a zero weight, 1 for w_p and 2 for -w_n. Symbols become base-3 numbers, one a byte, and these go
through the compressor that suits the layer best. Five symbols a byte (3**5 = 243) is the densest, and best for very
sparse layers. Three a byte make each byte a row of a 3x3 kernel: the weights of a row resemble each other, and 27
values are few enough for a Huffman code to be worth its table even in a small layer.
"""

import lzma
import zlib
from functools import cache
from typing import NamedTuple

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


class Coder(NamedTuple):
    """`digits` base-3 symbols a byte, then `compressor`."""

    compressor: str
    digits: int

    def __str__(self) -> str:
        return f"{self.compressor}, {self.digits} a byte"


# Files hold positions in this tuple.
CODERS = (Coder(RAW, 5), Coder(DEFLATE, 3), Coder(DEFLATE, 4), Coder(DEFLATE, 5), Coder(LZMA, 5))


def encode_symbols(symbols: np.ndarray) -> tuple[int, bytes]:
    """The shortest code of uint8 `[N]` in {0, 1, 2}: the coder's position in CODERS, and the bytes.

    Never more than N / 5 bytes, rounded up; two bit masks take N / 4.
    """
    packed = {digits: pack(symbols, digits).tobytes() for digits in {coder.digits for coder in CODERS}}
    codes = [compress(compressor, packed[digits]) for compressor, digits in CODERS]
    position = min(range(len(CODERS)), key=lambda i: len(codes[i]))
    return position, codes[position]


def decode_symbols(position: int, code: bytes, size: int) -> np.ndarray:
    """The symbols, uint8 `[size]`, that `encode_symbols` made a code of; ValueError if that is none of so many."""
    if position >= len(CODERS):
        raise ValueError(f"there is no coder {position}")
    compressor, digits = CODERS[position]
    numbers = decompress(compressor, code, -(-size // digits))
    return unpack(np.frombuffer(numbers, np.uint8), digits, size)


def entropy_bytes(symbols: np.ndarray) -> float:
    """First-order entropy of N symbols in bytes: N * H / 8, with H in bits a symbol."""
    counts = np.bincount(symbols, minlength=3)
    counts = counts[counts > 0]
    return float((counts * np.log2(symbols.size / counts)).sum() / 8)


def pack(symbols: np.ndarray, digits: int) -> np.ndarray:
    """Base-3 numbers of `digits` symbols, the first the most significant; uint8, the last filled up with zeros."""
    rows = np.zeros((-(-symbols.size // digits), digits), np.uint8)
    rows.reshape(-1)[: symbols.size] = symbols
    numbers = rows[:, 0].copy()
    for i in range(1, digits):
        numbers *= 3
        numbers += rows[:, i]
    return numbers


def unpack(numbers: np.ndarray, digits: int, size: int) -> np.ndarray:
    """The symbols, uint8 `[size]`, that `pack` made numbers of; ValueError if those hold more, or none."""
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


def encode_halves(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Float16 `[N]` as its deflated high bytes, and its low bytes, uint8 `[N]`.

    A high byte holds sign, exponent and two bits of the mantissa, which are far from equally frequent.
    """
    low, high = values.astype("<f2").view(np.uint8).reshape(-1, 2).T
    return compress(DEFLATE, high.tobytes()), low.copy()


def decode_halves(high: bytes, low: np.ndarray) -> np.ndarray:
    """The float16 `[N]` that `encode_halves` took apart; ValueError if there are not as many high bytes as low ones."""
    high = np.frombuffer(decompress(DEFLATE, high, low.size), np.uint8)
    return np.stack([low, high], axis=1).reshape(-1).view("<f2").astype(np.float16)


def compress(compressor: str, data: bytes) -> bytes:
    """The shortest that `compressor` can make of `data`."""
    if compressor == LZMA:
        return lzma.compress(data, lzma.FORMAT_RAW, filters=[LZMA_FILTER])
    if compressor == DEFLATE:  # other repeats than runs are chance: looking for them costs time and bytes
        return min(_deflate(data, zlib.Z_HUFFMAN_ONLY), _deflate(data, zlib.Z_RLE), key=len)
    return data


def decompress(compressor: str, code: bytes, size: int) -> bytes:
    """The `size` bytes that `compress` made `code` of; ValueError if it is damaged, or holds more or less than that.

    At most `size` + 1 bytes are made, whatever `code` would expand to.
    """
    if compressor == RAW:
        return code
    try:
        if compressor == LZMA:
            stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[LZMA_FILTER])
        else:
            stream = zlib.decompressobj(DEFLATE_WINDOW)
        data = stream.decompress(code, size + 1)
    except (zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"bad {compressor} data: {error}") from None
    if len(data) != size or not stream.eof or stream.unused_data:
        raise ValueError(f"{compressor} data that are not {size} bytes")
    return data


def _deflate(data: bytes, strategy: int) -> bytes:
    stream = zlib.compressobj(wbits=DEFLATE_WINDOW, memLevel=9, strategy=strategy)
    return stream.compress(data) + stream.flush()
