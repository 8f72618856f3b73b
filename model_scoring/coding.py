"""Lossless codes of a network's values: symbols of a layer, and 16-bit numbers.

Symbols are numbers below the layer's number of levels; in a ternary layer 0 is a zero weight, 1 is w_p and 2 is -w_n.
A layer's symbols become bytes in one of these ways, and all but the last go through a compressor; the shortest result
is kept:

- As many symbols a byte as it holds, five ternary ones (3**5 = 243). This bounds the size, whatever the symbols are.
- Three symbols a byte: a row of a 3x3 kernel, whose weights resemble each other. A Huffman code of 27 values
  pays for its table even in a small layer.
- One byte a nonzero ternary weight: its sign, and the gap before it.
- Range coding (`rans`), together with other layers' symbols. This bounds the size by their first-order entropy and 3%;
  beside that a layer takes a byte for each level and 0.0007 bits a weight at most, and all of them together 16 bytes.
"""

import lzma
import math
import zlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from model_scoring import rans

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
GAPS, FULL = 0, 5  # in the place of a number of digits; FULL is five in ternary layers
LONGEST_GAP = 127  # zeros in one byte, 254; a nonzero weight behind g < 127 zeros is 2 * g + (symbol - 1)


class Coder(NamedTuple):
    """So many digits of a number a byte (or FULL, or GAPS), then a compressor."""

    digits: int
    compressor: str

    def suits(self, levels: int) -> bool:
        """Whether symbols of so many levels can be coded so."""
        return levels == 3 if self.digits == GAPS else self.digits == FULL or levels**self.digits <= 256


# Files hold positions in this tuple; those behind its end are orders of `rans`.
CODERS = (Coder(FULL, RAW), Coder(FULL, LZMA), Coder(FULL, DEFLATE), Coder(3, DEFLATE), Coder(GAPS, DEFLATE))
ORDERS = (0, 1, 2)
COMPRESSORS = (RAW, DEFLATE, LZMA)


def encode_symbols(symbols: np.ndarray, levels: int = 3) -> tuple[int, bytes, float]:
    """The shortest code of uint8 `[N]` below `levels`: the coder's position, the bytes, and how many they are.

    Of range coding, which codes all layers at once, there are no bytes, and their number is estimated. Ternary symbols
    never take more than N / 5 bytes, rounded up; two bit masks take N / 4.
    """
    if levels == 1:
        return 0, b"", 0.0
    codes = {}
    for position, (digits, compressor) in enumerate(CODERS):
        if CODERS[position].suits(levels):
            code = compress(compressor, pack(symbols, digits, levels).tobytes())
            codes[position] = code, float(len(code))
    for order in ORDERS:
        codes[len(CODERS) + order] = b"", rans.cost(symbols, rans.Layer(symbols.size, levels, order))
    position = min(codes, key=lambda i: codes[i][1])
    return position, *codes[position]


def order_of(position: int) -> int | None:
    """The order of range coding, if that is the coder."""
    return position - len(CODERS) if position - len(CODERS) in ORDERS else None


def decode_symbols(position: int, code: bytes, size: int, levels: int = 3) -> np.ndarray:
    """The symbols, uint8 `[size]`, that `encode_symbols` coded; ValueError if they are not so many."""
    if position >= len(CODERS) or not CODERS[position].suits(levels):
        raise ValueError(f"there is no coder {position} of {levels} levels")
    digits, compressor = CODERS[position]
    return unpack(decompress(compressor, code, limit=size), digits, size, levels)


def entropy_bytes(symbols: np.ndarray) -> float:
    """First-order entropy of N symbols in bytes: N * H / 8, with H in bits a symbol."""
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float((counts * np.log2(symbols.size / counts)).sum() / 8)


def pack(symbols: np.ndarray, digits: int, levels: int = 3) -> np.ndarray:
    """Symbols as uint8 numbers: `digits` a number, the first most significant, zeros filling up; or GAPS."""
    if digits == GAPS:
        return _pack_gaps(symbols)
    digits = _digits(digits, levels)
    rows = np.zeros((-(-symbols.size // digits), digits), np.uint8)
    rows.reshape(-1)[: symbols.size] = symbols
    numbers = rows[:, 0].copy()
    for i in range(1, digits):
        numbers *= levels
        numbers += rows[:, i]
    return numbers


def unpack(numbers: np.ndarray, digits: int, size: int, levels: int = 3) -> np.ndarray:
    """The symbols, uint8 `[size]`, that `pack` made numbers of; ValueError if they are not so many."""
    if digits == GAPS:
        return _unpack_gaps(numbers, size)
    if levels == 1:
        if numbers.size:
            raise ValueError("symbols where all are equal")
        return np.zeros(size, np.uint8)
    digits = _digits(digits, levels)
    if numbers.size != -(-size // digits) or (numbers >= levels**digits).any():
        raise ValueError(f"symbols that are not {size} base-{levels} digits")
    symbols = _digits_of_numbers(digits, levels)[numbers].reshape(-1)
    if symbols[size:].any():
        raise ValueError(f"more than {size} symbols")
    return symbols[:size]


def _digits(digits: int, levels: int) -> int:
    """How many digits a number has; FULL: as many as a byte holds."""
    return int(math.log(256.5, levels)) if digits == FULL else digits


@cache
def _digits_of_numbers(digits: int, levels: int) -> np.ndarray:
    """The digits of every number: uint8 `[levels**digits, digits]`."""
    return np.indices((levels,) * digits, np.uint8).reshape(digits, -1).T.copy()


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
