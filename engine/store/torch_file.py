"""Torch files from strangers: read without running anything in them, in memory bounded by the file's size.

`torch.load(weights_only=True)` runs no code. What it leaves open is closed here: the checksums of the archive
are verified, so that no flipped bit becomes a weight; compressed entries are refused, as they may unpack to any
size; so is what lets a few bytes ask for any memory, such as `bytearray(10**11)` or a tensor of more values than
the file has; and what holds itself, or parts of itself many times over. The format before 2020 is no archive and
has no checksums.
"""

import itertools
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

import torch
from torch import Tensor

MAX_VALUES = 1_000_000  # tensors, numbers, texts and containers in a file
CHUNK = 2**20  # bytes read at a time
LEGACY_PICKLES = 5  # that a file in the old format begins with

# What a pickle may name; of these, torch.load still refuses all that it does not know.
HARMLESS = re.compile(
    r"collections (OrderedDict|Counter)|_codecs encode|torch\.nn\.parameter Parameter|torch\.serialization _get_layout|"
    r"torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|sparse_tensor|qtensor|"
    r"meta_tensor_no_storage)|torch (Size|device|\w+Storage|[a-z]\w*)|torch\.storage (Unt|T)ypedStorage"
)


class Refused(Exception):
    """A file is not read. The message says why, as a phrase that follows the file's name."""


def load(path: Path) -> object:
    """Read a torch file into plain containers and tensors on the CPU that share no memory.

    Raises Refused with the reason, and whatever damaged bytes lead `torch.load` to.
    """
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        if is_archive:
            _check_archive(file, path.stat().st_size)
        else:
            if file.read(2) != b"\x80\x02":
                raise ValueError("no pickle of torch")
            file.seek(0)
            for _ in range(LEGACY_PICKLES):
                _check_names(file)
    with warnings.catch_warnings(action="ignore"):  # of odd pickles; what matters becomes an error
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    try:
        return _plain(content, "", itertools.count(1))
    except RecursionError:
        raise Refused("holds containers within containers without end") from None


def _check_archive(file: BinaryIO, size: int) -> None:
    """Refuse an archive that torch.save did not write, or whose checksums do not match."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise Refused("holds compressed entries, and torch.save writes none")
        names = {entry.filename for entry in entries}
        if len(names) < len(entries) or sum(entry.file_size for entry in entries) > size or archive.comment:
            raise Refused("is damaged: its entries are not those that torch.save writes")
        for entry in entries:
            with archive.open(entry) as stream:  # compares the checksum at the end
                while stream.read(CHUNK):
                    pass
            if entry.filename.endswith("data.pkl"):
                with archive.open(entry) as stream:
                    _check_names(stream)


def _check_names(pickle: IO[bytes]) -> None:
    """Refuse a pickle that names what is not needed for tensors and plain values."""
    for operation, argument, _ in pickletools.genops(pickle):
        if operation.name == "GLOBAL" and not HARMLESS.fullmatch(str(argument)):
            name = str(argument).replace(" ", ".").removeprefix("__builtin__.")
            raise Refused(f"holds the Python object {name}, and only tensors and plain values are read from files")


def _plain(value: object, name: str, count: Iterator[int]) -> object:
    """A copy of `value` in plain containers; `name` is its key."""
    if next(count) > MAX_VALUES:
        raise Refused(f"holds more than {MAX_VALUES:,} values")
    if isinstance(value, dict):
        return {key: _plain(item, key, count) for key, item in dict.items(value)}
    if isinstance(value, list | tuple):
        kind = list if isinstance(value, list) else tuple
        return kind(_plain(item, name, count) for item in value)
    return _copied(value, name) if isinstance(value, Tensor) else value


def _copied(tensor: Tensor, name: str) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout not in (torch.strided, torch.sparse_coo):
        raise Refused(f"holds {name}, a tensor of layout {str(tensor.layout).removeprefix('torch.')}")
    parts = [tensor] if tensor.layout == torch.strided else [tensor._indices(), tensor._values()]
    for part in parts:
        if part.device.type == "cpu" and part.numel() * part.element_size() > part.untyped_storage().nbytes():
            raise Refused(f"is made up: {name} claims more values than the file holds")
    try:
        return tensor.clone()
    except RuntimeError as error:  # no more is copied than the file holds
        raise MemoryError(str(error)) from None
