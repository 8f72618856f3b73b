"""The bytes of a packed file: a safetensors container around an index and streams of values.

The container's metadata has one entry, since safetensors writes several in random order. It is JSON: the format's
version, and the SHA-256 of the whole file (computed with zeros in the place of that digest). The tensors are

    index    U8  JSON, deflated: the network's spec, what the checkpoint says of its training, names, shapes and types
                 of its tensors, number of lanes of the range coder, number of bytes of each stream and its compressor
    streams  U8  the streams, one behind the other

Streams are flat, and filled from one tensor of the network to the next:

    kinds    u1  one Kind a tensor
    half     f2  values of HALF tensors, the nonzero ones of SPARSE tensors; stored as their low, then their high bytes
    masks    u1  SPARSE tensors: one bit a value, set where it is not zero; every tensor begins a new byte
    raw      u1  values of RAW tensors, and the levels of BOOK tensors
    levels   u1  GRID and BOOK tensors: number of levels, less one
    coders   u1  their coder, a position in `coding.CODERS` or behind its end
    steps    u1  GRID tensors: w_p and w_n, as float32, or as float64 if the tensor is
    sizes    u4  GRID and BOOK tensors, unless range coded: number of bytes in `symbols`
    symbols  u1  these bytes
    depths   u1  range coded tensors: their probabilities (`rans`)
    words    u4  the code of all of them

Version 1 held built-in networks only, whose names and shapes followed from the spec, and ternary layers. Its
metadata has spec and extra as well, and the streams, some of other names, are the container's tensors.
"""

import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy

from engine.store.formats import PACKED as ENTRY
from model_scoring import coding

VERSION = 2
BLANK = "0" * 64  # stands for the digest while it is computed

# A file that claims more is refused before anything of that size is made.
MAX_HEADER = 2**16  # bytes
MAX_INDEX = 2**20  # bytes

Streams = dict[str, np.ndarray]
STREAMS = {
    "kinds": "<u1",
    "half": "<f2",
    "masks": "<u1",
    "raw": "<u1",
    "levels": "<u1",
    "coders": "<u1",
    "steps": "<u1",
    "sizes": "<u4",
    "symbols": "<u1",
    "depths": "<u1",
    "words": "<u4",
}
CODED = ("symbols", "words")  # nothing makes these shorter
VERSION_1 = {
    **dict.fromkeys(("kinds", "low", "high", "masks", "coders", "symbols"), "uint8"),
    **dict.fromkeys(("float", "centroids"), "float32"),
    "sizes": "uint32",
}


class BadFile(ValueError):
    """A file is no packed one, or not as it was written; the text says what to do."""


@dataclass(frozen=True)
class Content:
    """What a file says before its streams are looked at; its entries are as they are in the file, whatever that is."""

    version: int
    index: dict[str, Any]
    arrays: Streams


def seal(index: dict[str, Any], streams: Streams) -> tuple[bytes, dict[str, int]]:
    """The whole file, and the bytes that each stream takes in it.

    TypeError or ValueError if the index can't be written as JSON, or takes more than MAX_INDEX.
    """
    codes, places, sizes = [], [], dict.fromkeys(STREAMS, 0)
    for key, dtype in STREAMS.items():
        for data in _planes(key, streams[key].astype(dtype)):
            compressors = coding.COMPRESSORS[: 1 if key in CODED else None]
            options = [coding.compress(compressor, data) for compressor in compressors]
            code = min(options, key=len)
            sizes[key] += len(code)
            codes.append(code)
            places.append([len(code), options.index(code)])
    text = json.dumps(index | {"streams": places}, separators=(",", ":"), allow_nan=False)
    if len(text) > MAX_INDEX:
        raise ValueError(f"it takes more than {MAX_INDEX:,} bytes")
    arrays = {"index": zlib.compress(text.encode(), 9, coding.DEFLATE_WINDOW), "streams": b"".join(codes)}
    blank = safetensors.numpy.save(
        {key: np.frombuffer(data, np.uint8) for key, data in arrays.items()},
        {ENTRY: json.dumps({"version": VERSION, "sha256": BLANK}, separators=(",", ":"))},
    )
    return blank.replace(BLANK.encode(), hashlib.sha256(blank).hexdigest().encode(), 1), sizes


def open_sealed(data: bytes) -> Content:
    """What a file holds, found whole and unchanged; BadFile where it is not, ValueError where it is made up."""
    try:
        header = json.loads(data[8 : 8 + min(int.from_bytes(data[:8], "little"), MAX_HEADER)])
        content = json.loads(header["__metadata__"][ENTRY])
        version, digest = content["version"], content["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadFile("no packed network, or a damaged one; copy it again") from None
    if version not in (1, VERSION) or type(version) is not int:
        raise BadFile(f"format {short(repr(version))}, not {VERSION}; pack the network again")
    if not _is_digest(digest, data):
        raise BadFile("damaged, its checksum does not match; copy it again")
    try:
        arrays = safetensors.numpy.load(data)
    except Exception as error:  # safetensors raises its own, and whatever the declared types lead to
        raise ValueError(short(error)) from None
    expected = VERSION_1 if version == 1 else {"index": "uint8", "streams": "uint8"}
    if {key: array.dtype.name for key, array in arrays.items()} != expected:
        raise ValueError(f"its tensors are not {', '.join(expected)}")
    arrays = {key: array.reshape(-1) for key, array in arrays.items()}
    return Content(version, content if version == 1 else _index(arrays["index"]), arrays)


def streams_of(content: Content, limit: int) -> Streams:
    """The streams of a file; ValueError where they are not those of the format, or one has more than `limit` bytes."""
    if content.version == 1:
        return _streams_of_version_1(content.arrays)
    places, rest = content.index.get("streams"), content.arrays["streams"].tobytes()
    if not (type(places) is list and len(places) == len(STREAMS) + 1 and all(map(_is_place, places))):
        raise ValueError("streams that are not listed")
    planes = []
    for size, compressor in places:
        if size > len(rest):
            raise ValueError("streams end too early")
        planes.append(coding.decompress(coding.COMPRESSORS[compressor], rest[:size], limit))
        rest = rest[size:]
    if rest:
        raise ValueError(f"{len(rest)} bytes behind the streams")
    half = list(STREAMS).index("half")
    planes[half : half + 2] = [_interleaved(*planes[half : half + 2])]
    if any(plane.size % np.dtype(dtype).itemsize for plane, dtype in zip(planes, STREAMS.values(), strict=True)):
        raise ValueError("streams that end within a number")
    return {key: plane.view(dtype) for plane, (key, dtype) in zip(planes, STREAMS.items(), strict=True)}


def _streams_of_version_1(arrays: Streams) -> Streams:
    high = coding.decompress(coding.DEFLATE, arrays["high"].tobytes(), arrays["low"].size)
    return {key: np.empty(0, dtype) for key, dtype in STREAMS.items()} | {
        **{key: arrays[key] for key in ("kinds", "masks", "coders", "sizes", "symbols")},
        "half": _interleaved(arrays["low"], high).view("<f2"),
        "raw": arrays["float"].view(np.uint8),
        "levels": np.full(arrays["coders"].size, 2, np.uint8),
        "steps": arrays["centroids"].view(np.uint8),
    }


def _planes(key: str, stream: np.ndarray) -> list[bytes]:
    """A stream as bytes; of 16-bit numbers the low ones, then the high ones.

    A high byte holds sign, exponent and two bits of the mantissa, which are far from equally frequent.
    """
    if key != "half":
        return [stream.tobytes()]
    return [plane.tobytes() for plane in stream.view(np.uint8).reshape(-1, 2).T]


def _interleaved(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    if high.size != low.size:
        raise ValueError(f"{high.size} high bytes for {low.size} low ones")
    return np.stack([low, high], axis=1).reshape(-1)


def _index(array: np.ndarray) -> dict[str, Any]:
    try:
        index = json.loads(coding.decompress(coding.DEFLATE, array.tobytes(), MAX_INDEX).tobytes())
    except RecursionError:
        raise ValueError("an index that is none") from None
    if type(index) is not dict:
        raise ValueError("an index that is none")
    return index


def _is_place(place: object) -> bool:
    """Whether a stream's entry in the index is its number of bytes and a compressor."""
    if type(place) is not list or len(place) != 2 or not all(type(number) is int for number in place):
        return False
    return bool(place[0] >= 0 and 0 <= place[1] < len(coding.COMPRESSORS))


def _is_digest(digest: object, data: bytes) -> bool:
    """Whether `digest`, found in the file, is that of the file."""
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        return False
    return hashlib.sha256(data.replace(digest.encode(), BLANK.encode(), 1)).hexdigest() == digest


def short(text: object) -> str:
    """At most one line of a text that may be any."""
    return " ".join(str(text).split())[:120]
