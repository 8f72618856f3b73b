"""Torch files from strangers: read without running anything in them, in memory bounded by the file's size.

`torch.load(weights_only=True)` runs no code. What it leaves open is closed here: the checksums of the archive
are verified, so that no flipped bit becomes a weight; compressed entries are refused, as they may unpack to any
size; so is what lets a few bytes ask for any memory, such as `bytearray(10**11)` or a tensor of more values than
the file has; and what holds itself, or parts of itself many times over. The format before 2020 is no archive and
has no checksums.

What lies beside the weights, such as an `argparse.Namespace`, NumPy's numbers, paths, or objects of the writer's own
classes, is read as an `Inert` in its place and skipped: no such class is imported, nothing is called. A file that
names what a checkpoint never needs is refused as a whole: anything else of Python's own library (`os.system`, `eval`)
and of torch.
"""

import _compat_pickle
import itertools
import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar

import torch
from torch import Tensor
from torch._utils import IMPORT_MAPPING, NAME_MAPPING  # of Python 2's names, as torch.load maps them

MAX_VALUES = 1_000_000  # tensors, numbers, texts and containers in a file
CHUNK = 2**20  # bytes read at a time
MAX_NAMES = 200  # of classes that are not read
LEGACY_PICKLES = 5  # that a file in the old format begins with

# What a pickle may name that becomes what it says; of these, torch.load still refuses all that it does not know.
HARMLESS = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.(set|complex|bytes)|_codecs\.encode|torch\.nn\.parameter\.Parameter|"
    r"torch\.serialization\._get_layout|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|"
    r"parameter_with_state|sparse_tensor|qtensor|meta_tensor_no_storage)|torch\.(Size|device|\w+Storage|[a-z]\w*)|"
    r"torch\.storage\.(Unt|T)ypedStorage"
)
PYTHON_2 = _compat_pickle.IMPORT_MAPPING  # modules of Python's own library under names that pickles still use
# What of Python's and torch's own names is only ever data; names of other packages all become `Inert`. `getattr` is how
# the first releases of Python 3.11 write a member of an enumeration; it gets nothing here.
DATA = re.compile(
    r"(argparse|collections|datetime|decimal|enum|fractions|pathlib|uuid|zoneinfo)\..*|types\.SimpleNamespace|re\._compile|"
    r"functools\.partial|builtins\.(list|dict|tuple|frozenset|int|float|str|bool|object|range|slice|getattr)|"
    r"torch\.(nn|optim)\..*|torch\.torch_version\.TorchVersion"
)


WHOLE = (
    "is a whole Python object ({}) pickled with its class, and nothing in a file is executed; "
    "where its code is, save a network's weights alone: torch.save(network.state_dict(), FILE)"
)
NO_DATA = "holds the Python object {}, and only tensors and plain values are read from files"
GETATTR = "builtins.getattr"


class Refused(Exception):
    """A file is not read. The message says why, as a phrase that follows the file's name."""


def _no_bytes(*_: object) -> bytes:
    """How protocol 2 writes b""."""
    return b""


class _TakesItems(type):
    """Of classes whose objects torch.load lets a pickle fill: it compares an object's type with dict."""

    def __eq__(cls, other: object) -> bool:
        return other is dict or other is cls

    __hash__ = type.__hash__


class Inert(list[object], metaclass=_TakesItems):
    """In the place of an object whose class is not read: it takes whatever a pickle does to it, and does nothing.

    What was put into it by key or in order is kept: subclasses of dict and list are read as plain ones.
    """

    items: dict[object, object]
    __eq__: Any = object.__eq__
    __hash__: ClassVar[Any] = object.__hash__

    def __new__(cls, *_: object, **__: object) -> "Inert":
        made = super().__new__(cls)
        made.items = {}
        return made

    def __init__(self, *_: object, **__: object):
        pass

    def __setitem__(self, key: object, value: object) -> None:
        self.items[key] = value

    def __setstate__(self, _: object) -> None:
        pass


def load(path: Path) -> tuple[object, list[str]]:
    """Read a torch file into plain containers and tensors on the CPU that share no memory; and name what is skipped.

    Raises Refused with the reason, and whatever damaged bytes lead `torch.load` to.
    """
    names: dict[str, type] = {}  # of what becomes Inert
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        if is_archive:
            _check_archive(file, path.stat().st_size, names)
        else:
            if file.read(2) != b"\x80\x02":
                raise ValueError("no pickle of torch")
            file.seek(0)
            for _ in range(LEGACY_PICKLES):
                _check_names(file, names)
    known: list[tuple[str, Callable[..., Any]]] = [*names.items(), ("builtins.bytes", _no_bytes)]
    inert = torch.serialization.safe_globals([(kind, name) for name, kind in known])
    with inert, warnings.catch_warnings(action="ignore"):  # of odd pickles; what matters becomes an error
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        except pickle.UnpicklingError as error:
            if re.search("Can only (append to|extend) lists", str(error)):  # torch 2.11
                raise Refused(
                    "holds an object in the manner of a list (a deque, or a subclass of list), which this torch can't "
                    "skip; install a newer one, or save the state_dict alone"
                ) from None
            if "Only persistent_load of storage" in str(error):  # the source that the old format has of a module
                raise Refused(WHOLE.format(next(iter(names), "a module"))) from None
            if GETATTR in names:  # not for an enumeration, but for a method to call
                raise Refused(NO_DATA.format("getattr")) from None
            raise
    if isinstance(content, Inert) and not content.items:
        raise Refused(WHOLE.format(type(content).__name__))
    try:
        return _plain(content, "", itertools.count(1)), list(names)
    except RecursionError:
        raise Refused("holds containers within containers without end") from None


def _check_archive(file: BinaryIO, size: int, names: dict[str, type]) -> None:
    """Refuse an archive that torch.save did not write, or whose checksums do not match; see `_check_names`."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise Refused("holds compressed entries, and torch.save writes none")
        if (
            len({entry.filename for entry in entries}) < len(entries)
            or sum(entry.file_size for entry in entries) > size
            or archive.comment
        ):
            raise Refused("is damaged: its entries are not those that torch.save writes")
        for entry in entries:
            with archive.open(entry) as stream:  # compares the checksum at the end
                while stream.read(CHUNK):
                    pass
            if entry.filename.endswith("data.pkl"):
                with archive.open(entry) as stream:
                    _check_names(stream, names)


def _check_names(stream: IO[bytes], names: dict[str, type]) -> None:
    """Refuse a pickle that names what no checkpoint needs; note in `names` what becomes Inert instead."""
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name in ("STACK_GLOBAL", "INST", "FRAME"):
            raise Refused(
                "is pickled in another protocol than torch.save's own, 2; save it again without pickle_protocol"
            )
        if operation.name != "GLOBAL":
            continue
        module, _, name = str(argument).partition(" ")
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        name = f"{module}.{name}"
        if HARMLESS.fullmatch(name):
            continue
        package = module.partition(".")[0]
        if package in (*sys.stdlib_module_names, *PYTHON_2, "torch") and not DATA.fullmatch(name):
            name = name.removeprefix("builtins.")
            raise Refused(NO_DATA.format(name))
        if not re.fullmatch(r"[\w.]{1,200}", name) or len(names) > MAX_NAMES:
            raise Refused("is made up: it names what no program calls its classes, or more of them than any has")
        names[name] = names.get(name) or _TakesItems(name, (Inert,), {})


def _plain(value: object, name: str, count: Iterator[int]) -> object:
    """A copy of `value` in plain containers, without what is Inert; `name` is its key."""
    if next(count) > MAX_VALUES:
        raise Refused(f"holds more than {MAX_VALUES:,} values")
    if isinstance(value, Inert) and value.items:
        value = value.items
    if isinstance(value, dict):
        items = {key: item for key, item in dict.items(value) if not _is_skipped(key) and not _is_skipped(item)}
        copied = {key: _plain(item, key, count) for key, item in items.items()}
        return _with_versions(copied, value)
    if isinstance(value, list | tuple | set):
        kind = next(kind for kind in (list, tuple, set) if isinstance(value, kind))
        return kind(None if _is_skipped(item) else _plain(item, name, count) for item in value)
    return _copied(value, name) if isinstance(value, Tensor) else value


def _is_skipped(value: object) -> bool:
    return isinstance(value, Inert) and not value and not value.items


def _with_versions(copied: dict[Any, Any], source: dict[Any, Any]) -> dict[Any, Any]:
    """`copied` with the versions of a network's modules that a state dict has in its `_metadata`, if any."""
    metadata = getattr(source, "_metadata", None)
    if not isinstance(metadata, dict) or type(metadata) not in (dict, OrderedDict):
        return copied
    copied = OrderedDict(copied)
    vars(copied)["_metadata"] = {
        name: {"version": told["version"]}
        for name, told in metadata.items()
        if type(name) is str and isinstance(told, dict) and type(told.get("version")) is int
    }
    return copied


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
