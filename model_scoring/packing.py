"""The packed file: any network, at about as many bytes as its values are worth.

Quantized layers, ternary ones among them, are restored bit for bit, and so is whatever is no floating-point number;
all other values as `stored_values` has them. Zeros lose their sign where symbols or masks stand for them; BatchNorm's
counters of batches are left out, as in the checkpoints of 2019. What the bytes are is said in `container`.

Nothing that a file names is imported: names, shapes and types of the tensors are in the file. Those of a built-in
network are checked against what its spec builds.

A ResNet-20 with 64% zeros takes 46,831 bytes, 39,423 of them for its symbols. Their first-order entropy is
42,464 bytes; two bit masks take 66,816, DeepCABAC (arXiv:1907.11900, as NNCodec has it) 40,148.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from engine.program.errors import UserError
from engine.store.checkpoint import TOLD, Checkpoint
from engine.store.files import write_whole
from engine.store.values import stored_values
from model import Spec
from model.levels import Levels, grid, levels_of, numbers
from model.names import mismatches
from model_scoring import coding, rans
from model_scoring.container import STREAMS, BadFile, Streams, open_sealed, seal, streams_of
from model_scoring.packed_network import MAX_BYTES, TYPES, described, fitting, is_own_network, type_name


class Kind(IntEnum):
    """How a tensor is stored: its values at 16 or all bits, its nonzero values, or symbols of its levels."""

    HALF = 0
    RAW = 1
    SPARSE = 2
    GRID = 3
    BOOK = 4


@dataclass(frozen=True)
class PackedLayer:
    """A tensor in the packed file: its kind, and what it takes.

    Attributes:
        bytes: of the values and the mask, before their streams are compressed, or of the coded symbols with their
            probabilities; range coding takes all layers' together, and this is a layer's share.
        entropy_bytes: GRID, BOOK: the first-order entropy of the symbols. Others: 0.
    """

    name: str
    kind: Kind
    weights: int
    bytes: int
    entropy_bytes: float = 0.0


@dataclass(frozen=True)
class PackReport:
    """What packing came to: the bytes of the whole file, of all coded symbols, and of each tensor in its order."""

    path: Path
    file_bytes: int
    symbol_bytes: int
    layers: list[PackedLayer]

    @property
    def float32_bytes(self) -> int:
        """What the same values take as float32."""
        return 4 * sum(layer.weights for layer in self.layers)

    @property
    def quantized(self) -> list[PackedLayer]:
        return [layer for layer in self.layers if layer.kind in (Kind.GRID, Kind.BOOK)]

    @property
    def entropy_bytes(self) -> float:
        return sum(layer.entropy_bytes for layer in self.quantized)


def write_packed(checkpoint: Checkpoint, path: Path, half_precision: bool = True) -> PackReport:
    """Pack `checkpoint` into the file `path`, written as safely as `engine.store.checkpoint.save` writes.

    `half_precision` is that of `stored_values`; without it, values that are not quantized keep all their bits.
    """
    path, source, spec = Path(path), checkpoint.path, dict(checkpoint.spec)
    try:
        tensors = fitting(spec, checkpoint.state_dict)
    except BadFile as error:
        raise UserError(f"{source}: {error}") from None
    except ValueError as error:
        raise UserError(f"{source}: says that it is {spec['name']}, but {error}") from None
    _check_finite(spec, tensors, source, "take an earlier checkpoint")
    packing = _Packing()
    for name, tensor in tensors.items():
        if tensor.dtype not in TYPES.values() or tensor.layout != torch.strided:
            raise UserError(f"{source}: {name} is {tensor.layout} of {tensor.dtype}; packed files hold plain tensors")
        packing.add(name, stored_values(tensor.detach().cpu(), half_precision))
    streams, lanes = packing.streams()
    index = {
        "spec": spec,
        "extra": _small(checkpoint.extra),
        "lanes": lanes,
        "names": list(tensors),
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "types": {i: t for i, tensor in enumerate(tensors.values()) if (t := type_name(tensor)) != "float32"},
    }
    try:
        data, sizes = seal(index, streams)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: its description can't be written ({error}); pass shorter, plain arguments"
        ) from None
    write_whole(data, path)
    symbol_bytes = sizes["symbols"] + sizes["depths"] + sizes["words"]
    return PackReport(path, len(data), symbol_bytes, packing.layers)


def read_packed(path: Path) -> Checkpoint:
    """Restore what `write_packed` wrote; UserError where the file is damaged or made up.

    The spec may be that of a network of the user's own, of which nothing is imported; the caller checks names and
    shapes against what `--model` builds.
    """
    path = Path(path)
    try:
        content = open_sealed(_read(path))
        spec, extra, network = described(content)
        streams = streams_of(content, limit=sum(8192 + 16 * tensor.numel() for tensor in network.values()))
        stock = _Stock(streams, network, content.index.get("lanes"))
        state_dict = {name: _unpack(stock, tensor) for name, tensor in network.items()}
        stock.check_empty()
    except BadFile as error:
        raise UserError(f"{path}: {error}") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged, or made up ({error}); pack the network again") from None
    _check_finite(spec, state_dict, path, "pack the network again")
    return Checkpoint(path, spec, state_dict, _small(extra))


def pack(network: nn.Module, path: str | Path, half_precision: bool = True) -> PackReport:
    """Pack any network into the file `path`, as `write_packed` does; `unpack` loads it into a network of that kind."""
    builder = type(network)
    spec = {"name": f"{builder.__module__}:{builder.__qualname__}", "arguments": {}}
    return write_packed(Checkpoint(Path(path), spec, network.state_dict()), Path(path), half_precision)


def unpack(path: str | Path, network: nn.Module | None = None) -> nn.Module:
    """Load the packed file `path` into `network`, which is returned; without one, into a built-in network.

    UserError where the file is damaged, or its names and shapes are another network's.
    """
    checkpoint = read_packed(Path(path))
    if network is None:
        if is_own_network(checkpoint.spec):
            raise UserError(f"{path} holds a network that {checkpoint.spec['name']} built; pass one to load it into")
        return checkpoint.network()
    if differences := mismatches(network.state_dict(), checkpoint.state_dict):
        raise UserError(f"{path} holds another network: {differences[0]}")
    network.load_state_dict(checkpoint.state_dict, strict=False)  # BatchNorm's counters of batches are not in it
    return network


# One tensor, and its share of the streams.


class _Packing:
    """Streams that tensors are added to."""

    def __init__(self) -> None:
        self.layers: list[PackedLayer] = []
        self._pieces = {key: [np.empty(0, dtype)] for key, dtype in STREAMS.items()}
        self._ranged: list[tuple[np.ndarray, rans.Layer, float]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor of stored values; the kind depends on its values alone."""
        values = numbers(tensor)
        half = _halves(tensor)
        dense = tensor.nbytes if half is None else half.nbytes
        if half is not None and (sparse := -(-half.size // 8) + 2 * int(np.count_nonzero(half))) < dense:
            dense, kind, share = sparse, Kind.SPARSE, {"masks": np.packbits(half != 0), "half": half[half != 0]}
        elif half is not None:
            kind, share = Kind.HALF, {"half": half}
        else:
            kind, share = Kind.RAW, {"raw": _bytes(tensor)}
        levels = levels_of(values)
        if not levels or not self._add_symbols(name, levels, dense):
            self._add(PackedLayer(name, kind, values.size, dense), share)

    def _add_symbols(self, name: str, levels: Levels, limit: int) -> bool:
        """Add a tensor as symbols, if that takes fewer bytes than `limit`."""
        book, number = levels.values if levels.steps is None else levels.steps, levels.values.size
        if book.nbytes + 2 >= limit:
            return False
        position, code, size = coding.encode_symbols(levels.symbols, number)
        if book.nbytes + 2 + size >= limit:
            return False
        kind, key = (Kind.BOOK, "raw") if levels.steps is None else (Kind.GRID, "steps")
        share: dict[str, ArrayLike] = {key: book.view(np.uint8), "levels": [number - 1], "coders": [position]}
        if (order := coding.order_of(position)) is None:
            share |= {"sizes": [len(code)], "symbols": np.frombuffer(code, np.uint8)}
        else:
            self._ranged.append((levels.symbols, rans.Layer(levels.symbols.size, number, order), size))
        entropy = coding.entropy_bytes(levels.symbols)
        self._add(PackedLayer(name, kind, levels.symbols.size, round(size), entropy), share)
        return True

    def _add(self, layer: PackedLayer, share: Mapping[str, ArrayLike]) -> None:
        self.layers.append(layer)
        for key, values in {"kinds": [layer.kind], **share}.items():
            self._pieces[key].append(np.asarray(values, STREAMS[key]))

    def streams(self) -> tuple[Streams, int]:
        """The streams of all tensors, and the lanes of range coding."""
        streams, lanes = {key: np.concatenate(arrays) for key, arrays in self._pieces.items()}, 0
        if self._ranged:
            symbols, layers, sizes = zip(*self._ranged, strict=True)
            streams["depths"], streams["words"], lanes = rans.encode(np.concatenate(symbols), layers, sum(sizes))
        return streams, lanes


class _Stock:
    """Streams that are taken from front to back; ValueError where one ends too early or too late."""

    def __init__(self, streams: Streams, network: Mapping[str, Tensor], lanes: object):
        depths, words = streams.pop("depths"), streams.pop("words")
        self._left = streams
        if streams["kinds"].size != len(network):
            raise ValueError(f"{streams['kinds'].size} kinds of {len(network)} tensors")
        coded = [t.numel() for t, kind in zip(network.values(), streams["kinds"], strict=True) if kind >= Kind.GRID]
        if not len(coded) == streams["coders"].size == streams["levels"].size:
            raise ValueError(f"{streams['coders'].size} coders of {len(coded)} tensors")
        of_each = zip(coded, streams["levels"].tolist(), streams["coders"].tolist(), strict=True)
        orders = [(size, levels + 1, coding.order_of(position)) for size, levels, position in of_each]
        layers = [rans.Layer(size, levels, order) for size, levels, order in orders if order is not None]
        if sum(layer.entries for layer in layers) != depths.size or (words.size and not layers):
            raise ValueError(f"{depths.size} probabilities of {len(layers)} tensors")
        self._left["ranged"] = np.empty(0, np.uint8)
        if layers:
            self._left["ranged"] = rans.decode(layers, depths, words, lanes if type(lanes) is int else 0)

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


def _unpack(stock: _Stock, like: Tensor) -> Tensor:
    """The next tensor of the network, as the meta tensor `like`; ValueError where the streams hold none such."""
    size, kind = like.numel(), stock.take_number("kinds")
    if kind in (Kind.GRID, Kind.BOOK):
        return _unpack_symbols(stock, like, kind)
    if kind == Kind.RAW:
        return torch.from_numpy(stock.take("raw", size * like.dtype.itemsize).copy()).view(like.dtype).view(like.shape)
    if kind == Kind.SPARSE:
        mask = np.unpackbits(stock.take("masks", -(-size // 8)), count=size).astype(bool)
        half = np.zeros(size, np.float16)
        half[mask] = stock.take("half", int(mask.sum()))
    elif kind == Kind.HALF:
        half = stock.take("half", size).astype(np.float16)
    else:
        raise ValueError(f"there is no kind {kind} of tensor")
    tensor = torch.from_numpy(half)
    return (tensor.view(like.dtype) if like.dtype == torch.bfloat16 else tensor.to(like.dtype)).view(like.shape)


def _unpack_symbols(stock: _Stock, like: Tensor, kind: int) -> Tensor:
    levels, position = stock.take_number("levels") + 1, stock.take_number("coders")
    dtype = numbers(torch.empty(0, dtype=like.dtype)).dtype
    if kind == Kind.GRID:
        book = grid(stock.take("steps", 2 * dtype.itemsize).copy().view(dtype), levels // 2)
    else:
        book = stock.take("raw", levels * dtype.itemsize).copy().view(dtype)
    if coding.order_of(position) is None:
        code = stock.take("symbols", stock.take_number("sizes")).tobytes()
        symbols = coding.decode_symbols(position, code, like.numel(), levels)
    else:
        symbols = stock.take("ranged", like.numel())
    if kind == Kind.GRID and not (dtype.kind == "f" and levels % 2):
        raise ValueError(f"a grid of {levels} levels of {dtype}")
    return torch.from_numpy(book[symbols]).to(like.dtype).view(like.shape)


def _halves(tensor: Tensor) -> np.ndarray | None:
    """The elements as float16 numbers, of bfloat16 ones the same bits; None if that would change any."""
    flat = tensor.reshape(-1)
    if tensor.dtype == torch.bfloat16:
        return flat.view(torch.float16).numpy()
    if tensor.is_complex() or tensor.dtype.itemsize == 1:
        return None
    half = flat.half()
    is_exact = torch.equal(half.to(flat.dtype), flat) and (tensor.is_floating_point() or bool(half.isfinite().all()))
    return half.numpy() if is_exact else None


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _check_finite(spec: Spec, state_dict: Mapping[str, Tensor], path: Path, remedy: str) -> None:
    """UserError where a built-in network's tensors are not finite; in others there may be masks of -inf."""
    for name, tensor in state_dict.items() if not is_own_network(spec) else ():
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{path}: {name} holds NaN or infinite values; {remedy}")


def _small(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a checkpoint's `extra`, if a program here can have written it."""
    told = {key: is_valid for key, is_valid in TOLD.items() if key != "classes"}  # names would take many bytes
    return {key: extra[key] for key, is_valid in told.items() if key in extra and is_valid(extra[key])}


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: too large for a packed network; pass another file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); pass another file") from None
