"""Checkpoints: read safely whatever the file is, written so that no moment leaves half a file.

A checkpoint is a dict with `state_dict` (plain names) and `model` (the network's spec, see `model.build`), and
with what the stage that wrote it adds. Bare state dicts, what other programs write around them, and wrappers'
prefixes are read too (`model.names`).
"""

import io
import os
import re
import sys
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.images.datasets import DATASETS, MAX_IMAGE_SIZE
from engine.program.errors import UserError, is_out_of_memory
from engine.program.report import say
from engine.store import formats, torch_file
from engine.store.files import write_whole
from model import build
from model.identify import OtherNetwork, expected_state_dict, identify
from model.names import Fit, first, fit
from model.registry import Spec

SUFFIXES = (".pt", ".pth", ".th", ".tar", ".safetensors")
LISTED = 12  # files of a folder that an error message names

Content = dict[str, Any]
"""What is written to or read from a file: tensors, plain values, and dicts and lists of them, by name."""


@dataclass
class Checkpoint:
    """A network on disk: its spec, its tensors on the CPU, and whatever else the file holds."""

    path: Path
    spec: Spec
    state_dict: dict[str, Tensor]
    extra: Content = field(default_factory=dict)

    @property
    def image_size(self) -> int | None:
        """The size in pixels at which the checkpoint's accuracy was measured, if it says so."""
        return self.extra.get("val_image_size") or self.extra.get("image_size")

    def network(self) -> nn.Module:
        """Build the network and load the tensors."""
        network = build(self.spec)
        network.load_state_dict(self.state_dict, strict=False)  # names and shapes were checked on reading
        return network

    def with_classes(self, classes: list[str], dataset: str, data_path: str, seed: int) -> "Checkpoint":
        """This checkpoint if the network has as many classes as the data set, else one with a new classifier.

        All other tensors stay. The new classifier is drawn at random from `seed`, and a line says aloud that it is.
        """
        if len(classes) == self.spec["num_classes"]:
            self._compare_names(classes, data_path)
            return self
        say(
            f"NEW CLASSIFIER: {self.path} has {self.spec['num_classes']} classes, {dataset} in {data_path} has "
            f"{len(classes)}: the other layers are kept, the last one starts at random; if that is not meant, pass the "
            f"--dataset and --data-path that the network was trained on"
        )
        spec = {**self.spec, "num_classes": len(classes)}
        extra = {key: value for key, value in self.extra.items() if key != "classes"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = build(spec).state_dict()
        kept = {name: t for name, t in self.state_dict.items() if name in fresh and t.shape == fresh[name].shape}
        return replace(self, spec=spec, state_dict=fresh | kept, extra=extra)

    def check_classes(self, classes: list[str], dataset: str, data_path: str) -> None:
        """Raise a UserError unless the network has as many classes as the data set."""
        if len(classes) != self.spec["num_classes"]:
            raise UserError(
                f"{self.path} has {self.spec['num_classes']} classes, but {dataset} in {data_path} has "
                f"{len(classes)}; pass the --dataset and --data-path that the network was trained on"
            )
        self._compare_names(classes, data_path)

    def _compare_names(self, classes: list[str], data_path: str) -> None:
        """Say aloud where the network was trained on classes of other names, or in another order."""
        known = [unicodedata.normalize("NFC", name) for name in self.extra.get("classes", classes)]  # as data sets do
        if known != classes:
            i = next(i for i, (one, other) in enumerate(zip(known, classes, strict=True)) if one != other)
            say(
                f"OTHER CLASSES: {self.path} was trained on classes of other names or in another order than those in "
                f"{data_path}: number {i + 1} was {known[i]!r} and is {classes[i]!r}"
            )


def save(content: Content, path: Path) -> None:
    """Write `content` with torch.save; no moment leaves half a file."""
    buffer = io.BytesIO()
    torch.save(_canonical(content), buffer)
    write_whole(buffer.getbuffer(), path)


def _canonical(content: Any) -> Any:
    """`content` in plain containers that share nothing, so that equal content gives equal bytes when pickled."""
    if isinstance(content, Mapping):
        return {_canonical(key): _canonical(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_canonical(value) for value in content)
    return sys.intern(content) if type(content) is str else content


@contextmanager
def expecting(path: Path, what: str) -> Iterator[None]:
    """Use what was read from `path` in here: where that fails, a UserError says that it is not `what`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise UserError(f"{path}: is not {what} ({reason}); --no-resume starts the run afresh") from None


def network_content(spec: Spec, network: nn.Module, /, **extra: object) -> Content:
    """The content of a checkpoint of `network`: tensors on the CPU, in the default memory layout."""
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in network.state_dict().items()}
    return {"model": dict(spec), "state_dict": tensors} | extra


def copy(source: Path, target: Path) -> None:
    """Copy a checkpoint as safely as `save` writes one."""
    save(read(source), target)


def find(name: str, folder: Path) -> Path:
    """Return the file `name`, a path or a bare name in `folder`; UserError lists the folder if there is none."""
    for path in (folder / name, Path(name)):
        if os.path.isfile(path):
            return path
    if os.path.isdir(name):
        raise UserError(f"{name!r} is a folder; pass a file in it ({_listing(Path(name))})")
    if os.path.dirname(name):
        raise UserError(f"no file {name!r} ({_listing(Path(name).parent)})")
    raise UserError(f"no file {name!r}, neither as a path nor in {folder} ({_listing(folder)})")


def read(path: Path) -> Content:
    """Read a torch or safetensors file without executing anything in it; UserError where it is not one, or damaged.

    Objects of Python beside the tensors are left out, and a line says which.
    """
    if what := formats.foreign(path):
        raise UserError(f"{path}: {what}")
    if formats.is_packed(path):
        unpacking = f"run_scoring.py --t-model {path} --unpack FILE.pt"
        raise UserError(f"{path}: is a packed file; make a checkpoint of it with {unpacking}")
    try:
        content, skipped = (load_file(path), []) if formats.is_safetensors(path) else torch_file.load(path)
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        raise UserError(f"{path}: {_damage(path, error)}; {_another(path)}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of tensors; {_another(path)}")
    if skipped:
        names = ", ".join(name.removeprefix("builtins.") for name in skipped)
        if not content:
            raise UserError(f"{path}: holds Python objects ({names}), and no tensors; {_another(path)}")
        say(f"{path}: skipped what is neither tensors nor plain values, nothing of it is executed ({names})")
    return dict(content) if type(content) is not OrderedDict else content


def _damage(path: Path, error: Exception) -> str:
    """Say in plain words why reading failed with `error`."""
    if isinstance(error, torch_file.Refused):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"can't be read ({error.strerror})"
    if kept_out := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"holds the Python object {kept_out[1]}, and only tensors and plain values are read from files"
    with open(path, "rb") as file:
        start = file.read(2)
    if not start:
        return "is empty"
    known = start in (b"PK", b"\x80\x02") or formats.is_safetensors(path)
    return "is truncated or damaged" if known else "is not a PyTorch checkpoint"


def _another(path: Path) -> str:
    return f"pass another file ({_listing(path.parent)})"


def _listing(folder: Path) -> str:
    """Say what lies in `folder`, checkpoints first."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    there = (path for path in folder.iterdir() if not path.name.startswith("."))
    files = sorted(there, key=lambda path: (path.suffix not in SUFFIXES, path.name))
    names = [f"{path.name}/" if path.is_dir() else path.name for path in files[:LISTED]]
    more = f" and {len(files) - LISTED} more" if len(files) > LISTED else ""
    return f"{folder} holds {', '.join(names) or 'no files'}{more}"


def read_state_dict(
    path: Path, network: nn.Module, builder: str, found: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Read the tensors of `network`, the user's own that `builder` built; UserError if they do not fit it.

    `found` are those that were read from a packed file.
    """
    expected = {name: t for name, t in network.state_dict().items() if isinstance(t, Tensor)}
    fitted = fit(expected, _state_dict(read(path), path) if found is None else found)
    if fitted.differences:
        raise UserError(f"{path} does not fit what {builder} builds: {first(fitted.differences)}")
    _say_notes(path, fitted)
    weights = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    _check_values(fitted.tensors, expected, weights, path)
    return fitted.tensors


def read_network(path: Path, wanted: Spec | None = None) -> Checkpoint:
    """Read a network's checkpoint; what the file says of itself goes first, then names and shapes.

    `wanted` is a spec that the user's flags ask for, possibly partial; a checkpoint of another
    architecture or width is a UserError that names both.
    """
    content = read(path)
    state_dict = _state_dict(content, path)
    with naming(path):
        spec, fitted = identify(state_dict, content.get("model"), wanted)
    _say_notes(path, fitted)
    expected = expected_state_dict(spec)
    _check_values(fitted.tensors, expected, set(expected), path)
    extra = {key: value for key, value in content.items() if type(key) is str and key not in ("model", "state_dict")}
    extra = _usable(extra) if "state_dict" in content else {}
    if len(extra.get("classes", ())) != spec["num_classes"]:
        extra.pop("classes", None)
    return Checkpoint(path, spec, dict(fitted.tensors), extra)


def _say_notes(path: Path, fitted: Fit) -> None:
    for note in fitted.notes:
        say(f"{path}: {note}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Identify the network in the file `path` in here: what is wrong with it becomes a UserError that names it."""
    try:
        yield
    except OtherNetwork as error:
        raise UserError(f"{path} {error}") from None
    except ValueError as error:
        raise UserError(
            f"{path}: {error}; {_another(path)}; "
            f"run_scoring.py scores networks of your own with --model module:function"
        ) from None


WEIGHTS = ("state_dict", "model_state_dict", "model_state", "net", "model", "network", "weights", "params", "module")
AVERAGED = re.compile(r"(^|_)ema(_|$)")  # keys of weights that are a moving average of those that are trained
NO_WEIGHTS = re.compile(r"optim|sched|scaler|loss|criterion|rng")


def _state_dict(content: Content, path: Path) -> dict[str, Tensor]:
    """The tensors by name among what programs write around them; a line says which, where there is a choice."""
    averaged = [key for key in content if isinstance(key, str) and AVERAGED.search(key)]
    found = {key: tensors for key in (*WEIGHTS, *averaged) if (tensors := _tensors(content.get(key)))}
    if not found and (tensors := _own_tensors(content)):
        return tensors
    if not found:
        others = [key for key in content if not NO_WEIGHTS.search(str(key))]
        found = {key: tensors for key in others if (tensors := _tensors(content[key]))}
        found = found if len(found) == 1 else {}
    if not found:
        keys = ", ".join(map(str, list(content)[:5]))
        raise UserError(f"{path}: holds no tensors by name (its keys: {keys or 'none'}); {_another(path)}")
    key, *others = found
    if others:
        average = ", ".join(other for other in others if other in averaged)
        hint = f"; for the moving average, save that alone: torch.save(content[{average!r}], FILE)" if average else ""
        say(f"{path}: holds weights as {', '.join(found)}; {key} is taken{hint}")
    elif key in averaged:
        say(f"{path}: the weights are those of the moving average {key}")
    return found[key]


def _tensors(value: object, depth: int = 2) -> dict[str, Tensor] | None:
    """The tensors by name in `value`, or in what lies in it under a name of WEIGHTS."""
    if not isinstance(value, Mapping):
        return None
    nested = (_tensors(value.get(key), depth - 1) for key in WEIGHTS) if depth else ()
    return _own_tensors(value) or next(filter(None, nested), None)


def _own_tensors(value: Mapping[Any, Any]) -> dict[str, Tensor] | None:
    """The tensors by name in a state dict, beside which plain values such as `epoch` may be; None in what is none."""
    named = [name for name, tensor in value.items() if isinstance(tensor, Tensor) and isinstance(name, str)]
    others = [str(name) for name in value if name not in named and not str(name).endswith("_extra_state")]
    if not named or (others and not any("." in name for name in named)) or any("." in name for name in others):
        return None
    tensors = OrderedDict((name, value[name]) for name in named)
    if hasattr(value, "_metadata"):
        vars(tensors)["_metadata"] = value._metadata
    return tensors


def _check_values(
    state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], weights: set[str], path: Path
) -> None:
    """Raise a UserError unless the tensors are plain, of their kinds, and finite where they are weights."""
    for name, tensor in state_dict.items():
        if name not in expected:
            continue
        real = expected[name].is_floating_point()
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_complex() or tensor.is_floating_point() != real:
            kind = f"{tensor.layout} of {tensor.dtype} on {tensor.device}".replace("torch.", "")
            raise UserError(
                f"{path}: {name} is {kind}, not a plain tensor of {'floating point' if real else 'whole'} numbers"
            )
        is_weight = name in weights or name.endswith(("running_mean", "running_var"))
        if real and is_weight and not torch.isfinite(tensor.float()).all():
            raise UserError(f"{path}: {name} holds NaN or infinite values; take an earlier checkpoint")


def _is_image_size(size: object) -> bool:
    return type(size) is int and 0 < size <= MAX_IMAGE_SIZE


# What a checkpoint says of its network's training, and what a program here can have written there.
TOLD: dict[str, Callable[[object], bool]] = {
    "dataset": lambda name: type(name) is str and name in DATASETS,
    "image_size": _is_image_size,
    "val_image_size": _is_image_size,
    "accuracy": lambda accuracy: type(accuracy) is float,
    "classes": lambda names: type(names) is list and all(type(name) is str for name in names),
}


def _usable(extra: Content) -> Content:
    """`extra` without what no program here can have written."""
    return {key: value for key, value in extra.items() if key not in TOLD or TOLD[key](value)}
