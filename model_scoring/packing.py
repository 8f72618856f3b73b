"""The packed file: a network in a safetensors container, at about as many bytes as its values are worth.

Ternary layers are restored bit for bit, all other values as float16 has them (float32 where float16 is too
narrow). Zeros lose their sign; BatchNorm's counters of batches are left out, as in the checkpoints of 2019.

The file holds no names and no shapes: these follow from the network's spec, and so does the order of
everything. The container's tensors are flat, and filled from one tensor of the network to the next:

    kinds      U8   one Kind a tensor
    low        U8   low bytes of float16 values: all those of HALF tensors, the nonzero ones of SPARSE tensors
    high       U8   their high bytes, deflated in one stream
    masks      U8   SPARSE tensors: one bit a value, set where it is not zero; every tensor begins a new byte
    float      F32  the values of FLOAT tensors
    coders     U8   TERNARY tensors: one position in `coding.CODERS` a tensor
    sizes      U32  their number of bytes in `symbols`, one a tensor
    centroids  F32  their w_p and w_n, two a tensor
    symbols    U8   their coded symbols

The container's metadata has one entry, since safetensors writes several in random order. It is JSON: the
format's version, the network's spec, what the checkpoint says of its training, and the SHA-256 of the whole
file (computed with zeros in the place of that digest).

A ResNet-20 with 64% zeros takes 47,928 bytes, 40,167 of them for its symbols. Their first-order entropy is
42,464 bytes; two bit masks take 66,816, DeepCABAC (arXiv:1907.11900, as NNCodec has it) 40,763, and LZMA on
all layers' symbols, five a byte, 40,676.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from engine.program.errors import UserError
from engine.store.checkpoint import TOLD, Checkpoint, Content
from engine.store.files import write_whole
from engine.store.formats import PACKED as ENTRY
from model import ROWS, Spec
from model.identify import expected_state_dict
from model.names import mismatches
from model.selection import is_ternary
from model_scoring import coding

VERSION = 1
BLANK = "0" * 64  # stands for the digest while it is computed

# A file that claims more is refused before anything of that size is made.
MAX_WEIGHTS = 2**27  # seven times those of EfficientNet-B4
MAX_BYTES = 4 * MAX_WEIGHTS
MAX_HEADER = 2**16  # bytes

Streams = dict[str, np.ndarray]
STREAMS = {
    "kinds": np.uint8,
    "half": np.float16,  # `low` and `high` in the file
    "masks": np.uint8,
    "float": np.float32,
    "coders": np.uint8,
    "sizes": np.uint32,
    "centroids": np.float32,
    "symbols": np.uint8,
}
CONTAINER = {**STREAMS, "low": np.uint8, "high": np.uint8}
del CONTAINER["half"]


class Kind(IntEnum):
    """How a tensor is stored."""

    HALF = 0
    FLOAT = 1
    SPARSE = 2
    TERNARY = 3


@dataclass(frozen=True)
class PackedLayer:
    """A tensor in the packed file: its kind, and what it takes.

    Attributes:
        bytes: TERNARY: of the coded symbols, without the centroids (8 bytes). Others: of the values and the
            mask; float16 values are counted as two bytes, before their high bytes are deflated.
        entropy_bytes: TERNARY: the first-order entropy of the symbols. Others: 0.
    """

    name: str
    kind: Kind
    weights: int
    bytes: int
    entropy_bytes: float = 0.0


@dataclass(frozen=True)
class PackReport:
    """What packing came to: the bytes of the whole file, and of each tensor of the network in its order."""

    path: Path
    file_bytes: int
    layers: list[PackedLayer]

    @property
    def float32_bytes(self) -> int:
        """What the same values take as float32."""
        return 4 * sum(layer.weights for layer in self.layers)

    @property
    def ternary(self) -> list[PackedLayer]:
        return [layer for layer in self.layers if layer.kind == Kind.TERNARY]

    @property
    def ternary_bytes(self) -> int:
        return sum(layer.bytes for layer in self.ternary)

    @property
    def entropy_bytes(self) -> float:
        return sum(layer.entropy_bytes for layer in self.ternary)


def write_packed(checkpoint: Checkpoint, path: Path) -> PackReport:
    """Pack `checkpoint` into the file `path`, written as safely as `engine.store.checkpoint.save` writes."""
    path, source = Path(path), checkpoint.path
    network = _network(checkpoint.spec, source)
    if differences := mismatches(network, checkpoint.state_dict):
        raise UserError(f"{source}: says that it is {checkpoint.spec['name']}, but {differences[0]}")
    pieces = {key: [np.empty(0, dtype)] for key, dtype in STREAMS.items()}
    layers = []
    for name in network:
        tensor = checkpoint.state_dict[name].detach().cpu().float()
        if not torch.isfinite(tensor).all():
            raise UserError(f"{source}: {name} holds NaN or infinite values; take an earlier checkpoint")
        layer, stored = _pack(name, stored_values(tensor))
        layers.append(layer)
        for key, values in stored.items():
            pieces[key].append(np.asarray(values, STREAMS[key]))
    streams = {key: np.concatenate(arrays) for key, arrays in pieces.items()}
    data = _seal(streams, checkpoint.spec, _small(checkpoint.extra))
    write_whole(data, path)
    return PackReport(path, len(data), layers)


def read_packed(path: Path) -> Checkpoint:
    """Restore what `write_packed` wrote, in float32; UserError where the file is damaged or made up."""
    path = Path(path)
    data = _read(path)
    content = _content(data, path)
    spec, extra = content.get("spec"), content.get("extra")
    if not isinstance(spec, dict) or not isinstance(extra, dict):
        raise UserError(f"{path}: does not say which network it holds; pack the network again")
    network = _network(spec, path)
    try:
        stock = _Stock(_open(data))
        state_dict = {name: _unpack(stock, tuple(tensor.shape)) for name, tensor in network.items()}
        stock.check_empty()
    except ValueError as error:
        raise UserError(f"{path}: damaged, or made up ({error}); pack the network again") from None
    for name, tensor in state_dict.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or infinite values; pack the network again")
    return Checkpoint(path, spec, state_dict, _small(extra))


def stored_values(tensor: Tensor) -> Tensor:
    """The values that packing keeps of a float32 tensor: rounded to float16, unless it is ternary.

    Float16 is too narrow for a tensor whose largest magnitude is not in its normal range, 6.1e-5 to 65504
    (variances of BatchNorm can be large): such a tensor is kept as it is. In all others a value changes by
    2**-11 of itself at most, or by 2**-25 where that is more: far below the epsilon that BatchNorm adds to
    variances.
    """
    half, largest = torch.finfo(torch.float16), tensor.abs().max()
    if _is_ternary_layer(tensor) or not half.tiny <= largest <= half.max:
        return tensor
    return tensor.half().float()


def _is_ternary_layer(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and is_ternary(tensor)


# One tensor, and its share of the streams.


def _pack(name: str, tensor: Tensor) -> tuple[PackedLayer, dict[str, ArrayLike]]:
    """What a tensor of stored values adds to the streams; the kind depends on its values alone."""
    values = tensor.reshape(-1).numpy()
    nonzero = values[values != 0]
    half_bytes, sparse_bytes = 2 * values.size, -(-values.size // 8) + 2 * nonzero.size
    if _is_ternary_layer(tensor):
        layer, streams = _pack_ternary(name, values)
    elif not torch.equal(tensor.half().float(), tensor):
        layer = PackedLayer(name, Kind.FLOAT, values.size, 4 * values.size)
        streams = {"float": values}
    elif sparse_bytes < half_bytes:
        layer = PackedLayer(name, Kind.SPARSE, values.size, sparse_bytes)
        streams = {"masks": np.packbits(values != 0), "half": nonzero}
    else:
        layer = PackedLayer(name, Kind.HALF, values.size, half_bytes)
        streams = {"half": values}
    return layer, {"kinds": [layer.kind], **streams}


def _pack_ternary(name: str, values: np.ndarray) -> tuple[PackedLayer, dict[str, ArrayLike]]:
    positive, negative = values > 0, values < 0
    symbols = positive + 2 * negative.astype(np.uint8)
    position, code = coding.encode_symbols(symbols)
    layer = PackedLayer(name, Kind.TERNARY, values.size, len(code), coding.entropy_bytes(symbols))
    return layer, {
        "coders": [position],
        "sizes": [len(code)],
        "centroids": [abs(values.max(where=positive, initial=0)), abs(values.min(where=negative, initial=0))],
        "symbols": np.frombuffer(code, np.uint8),
    }


class _Stock:
    """Streams that are taken from front to back; ValueError where one ends too early or too late."""

    def __init__(self, streams: Streams):
        self._left = dict(streams)

    def take(self, key: str, number: int) -> np.ndarray:
        stream = self._left[key]
        if number > stream.size:
            raise ValueError(f"{key} end too early")
        self._left[key] = stream[number:]
        return stream[:number]

    def take_number(self, key: str) -> int:
        return int(self.take(key, 1)[0])

    def check_empty(self) -> None:
        for key, stream in self._left.items():
            if stream.size:
                raise ValueError(f"{stream.size} {key} too many")


def _unpack(stock: _Stock, shape: tuple[int, ...]) -> Tensor:
    """The next tensor of the network; ValueError where the streams hold none of this shape."""
    size, kind = prod(shape), stock.take_number("kinds")
    if kind == Kind.TERNARY:
        code = stock.take("symbols", stock.take_number("sizes")).tobytes()
        symbols = coding.decode_symbols(stock.take_number("coders"), code, size)
        w_p, w_n = stock.take("centroids", 2)
        values = np.array([0, w_p, -w_n], np.float32)[symbols]
    elif kind == Kind.SPARSE:
        mask = np.unpackbits(stock.take("masks", -(-size // 8)), count=size).astype(bool)
        values = np.zeros(size, np.float32)
        values[mask] = stock.take("half", int(mask.sum()))
    elif kind == Kind.HALF:
        values = stock.take("half", size).astype(np.float32)
    elif kind == Kind.FLOAT:
        values = stock.take("float", size).astype(np.float32)
    else:
        raise ValueError(f"there is no kind {kind} of tensor")
    return torch.from_numpy(values).view(shape)


# The container.


def _seal(streams: Streams, spec: Spec, extra: Content) -> bytes:
    """The whole file."""
    high, low = coding.encode_halves(streams["half"])
    arrays = {key: stream for key, stream in streams.items() if key != "half"}
    arrays |= {"low": low, "high": np.frombuffer(high, np.uint8)}
    content = {"version": VERSION, "sha256": BLANK, "spec": spec, "extra": extra}
    blank = safetensors.numpy.save(arrays, {ENTRY: json.dumps(content, separators=(",", ":"))})
    return blank.replace(BLANK.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


def _content(data: bytes, path: Path) -> Content:
    """What the metadata says, once version and digest are found right."""
    try:
        header = json.loads(data[8 : 8 + min(int.from_bytes(data[:8], "little"), MAX_HEADER)])
        content = json.loads(header["__metadata__"][ENTRY])
        version, digest = content["version"], content["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: no packed network, or a damaged one; copy it again") from None
    if version != VERSION:
        raise UserError(f"{path}: format {_short(repr(version))}, not {VERSION}; pack the network again")
    if not _is_digest(digest, data):
        raise UserError(f"{path}: damaged, its checksum does not match; copy it again")
    return content


def _is_digest(digest: object, data: bytes) -> bool:
    """Whether `digest`, found in the file, is that of the file."""
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        return False
    return hashlib.sha256(data.replace(digest.encode(), BLANK.encode(), 1)).hexdigest() == digest


def _open(data: bytes) -> Streams:
    """The streams in a file; ValueError where they are not those of the format."""
    try:
        arrays = safetensors.numpy.load(data)
    except Exception as error:  # safetensors raises its own, and whatever the declared types lead to
        raise ValueError(_short(error)) from None
    if {key: array.dtype for key, array in arrays.items()} != CONTAINER:
        raise ValueError(f"its tensors are not {', '.join(CONTAINER)}")
    streams = {key: array.reshape(-1) for key, array in arrays.items()}
    streams["half"] = coding.decode_halves(streams.pop("high").tobytes(), streams.pop("low"))
    return streams


def _network(spec: Spec, path: Path) -> dict[str, Tensor]:
    """Names and shapes of the network that `spec` describes: meta tensors, no memory whatever it claims."""
    row = ROWS.get(str(spec.get("name")))
    if row is None or spec.keys() != {"name", *row.arguments} or not all(_is_positive(spec[a]) for a in row.arguments):
        raise UserError(f"{path}: {_short(spec)} describes no network; pack another")
    try:
        state_dict = expected_state_dict(spec)
    except Exception as error:  # a made-up spec leads to anything
        raise UserError(f"{path}: its network can't be built ({_short(error)}); pack another") from None
    network = {name: tensor for name, tensor in state_dict.items() if tensor.is_floating_point()}
    if sum(tensor.numel() for tensor in network.values()) > MAX_WEIGHTS:
        raise UserError(f"{path}: its network has more than {MAX_WEIGHTS:,} weights; pack a smaller one")
    return network


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _small(extra: Content) -> Content:
    """What is kept of a checkpoint's `extra`, if a program here can have written it."""
    told = {key: is_valid for key, is_valid in TOLD.items() if key != "classes"}  # names would take many bytes
    return {key: extra[key] for key, is_valid in told.items() if key in extra and is_valid(extra[key])}


def _short(text: object) -> str:
    """At most one line of a text that may be any."""
    return " ".join(str(text).split())[:120]


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: too large for a packed network; pass another file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); pass another file") from None
