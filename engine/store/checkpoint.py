"""Checkpoints: read safely whatever the file is, written so that no moment leaves half a file.

A checkpoint is a dict with `state_dict` (plain names) and `model` (the network's spec, see `model.build`), and
with what the stage that wrote it adds. Bare state dicts, what other programs write around them, and wrappers'
prefixes are read too (`model.names`).
"""

import hashlib
import io
import os
import re
import shlex
import sys
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from engine.images.datasets import DATASETS, MAX_IMAGE_SIZE
from engine.program.errors import UserError, is_out_of_memory
from engine.program.report import narrate, say
from engine.store import formats, torch_file
from engine.store.files import another, listing, write_whole
from engine.store.tensors import check_values, tensors_in
from model import build
from model.identify import OtherNetwork, expected_state_dict, identify
from model.names import Fit, first, fit, unwrapped
from model.own import PRETRAINED, is_own, label_of, may_be_called, run_once, takes
from model.registry import Spec

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

    @property
    def sha256(self) -> str:
        """The digest of the file; without one, of the tensors."""
        sha = hashlib.sha256()
        if self.path.is_file():
            sha.update(self.path.read_bytes())
        else:
            for tensor in self.state_dict.values():
                sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def network(self) -> nn.Module:
        """Build the network and load the tensors, whose names and shapes were checked on reading.

        They are loaded as of the versions of modules that the file tells, or else of today's.
        """
        network, state_dict = build(self.spec), self.state_dict
        if not hasattr(state_dict, "_metadata"):
            state_dict = OrderedDict(state_dict)
            vars(state_dict)["_metadata"] = vars(network.state_dict())["_metadata"]
        try:
            network.load_state_dict(state_dict, strict=False)
        except (RuntimeError, ValueError) as error:  # a network's own code may refuse what fits
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.path} can't be loaded into the network ({reason}); save its state_dict again"
            ) from None
        for module in network.modules():
            if isinstance(module, LazyModuleMixin) and not module.has_uninitialized_params():
                module._infer_parameters(
                    module, (next(module.parameters())[:0],)
                )  # sizes are known: it is lazy no longer
        return network

    def run_at(self, image_size: int) -> "Checkpoint":
        """This checkpoint with the number of classes in its spec, which an image tells of a network of the user's own.

        `image_size` is in pixels; `model.own.OwnCodeError` where the network does not run so.
        """
        if not is_own(self.spec["name"]):
            return self
        network = self.network()
        spec = {**self.spec, "num_classes": run_once(network, image_size).classes}
        return replace(self, spec=spec, state_dict=network.state_dict())  # its lazy modules have sizes now

    def with_classes(self, classes: list[str], dataset: str, data_path: str, seed: int) -> "Checkpoint":
        """This checkpoint if the network has as many classes as the data set, else one with a new classifier.

        All other tensors stay. The new classifier is drawn at random from `seed`, and a line says aloud that it is.
        UserError where the user's own builder takes no `num_classes`.
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
        if is_own(spec["name"]):
            if not takes(spec["name"], "num_classes"):
                raise UserError(
                    f"{spec['name']} takes no num_classes, and builds {self.spec['num_classes']} where {dataset} in "
                    f"{data_path} has {len(classes)}; pass --model-args that make it build as many"
                )
            spec["arguments"] = without_weights(spec.get("arguments", {})) | {"num_classes": len(classes)}
        extra = {key: value for key, value in self.extra.items() if key not in ("classes", "accuracy")}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = build(spec).state_dict()
        if fresh.keys() == self.state_dict.keys() and all(
            t.shape == fresh[name].shape for name, t in self.state_dict.items()
        ):
            raise UserError(
                f"{spec['name']} builds the same network whatever num_classes is; make it one of {len(classes)} classes"
            )
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


def as_built(spec: Spec) -> Checkpoint:
    """A network of the user's own with the weights that its builder gives it, without a file."""
    network = build(spec)
    plain = {**spec, "arguments": without_weights(spec.get("arguments", {}))}
    state_dict = {name: t for name, t in network.state_dict().items() if not is_lazy(t)}
    return Checkpoint(Path(label_of(spec["name"])), plain, state_dict)


def without_weights(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A builder's arguments without those that choose values, which a checkpoint has, and not the network."""
    return {key: value for key, value in arguments.items() if key not in PRETRAINED}


def find(name: str, *folders: Path) -> Path:
    """Return the file `name`, a bare name in one of `folders`, or a path; else UserError."""
    for path in (*(folder / name for folder in folders), Path(name)):
        if os.path.isfile(path):
            return path
    if os.path.isdir(name):
        raise UserError(f"{name!r} is a folder; pass a file in it ({listing(Path(name))})")
    if os.path.dirname(name):
        raise UserError(f"no file {name!r} ({listing(Path(name).parent)})")
    raise UserError(
        f"no file {name!r}, neither as a path nor in {' nor '.join(map(str, folders))} ({listing(folders[0])})"
    )


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
        raise UserError(f"{path}: {_damage(path, error)}; {another(path)}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of tensors; {another(path)}")
    if skipped:
        names = ", ".join(name.removeprefix("builtins.") for name in skipped)
        if not content:
            raise UserError(f"{path}: holds Python objects ({names}), and no tensors; {another(path)}")
        narrate(f"{path}: skipped what is neither tensors nor plain values, nothing of it is executed ({names})")
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


def read_network(path: Path, wanted: Spec | None = None) -> Checkpoint:
    """Read a network's checkpoint; what the file says of itself goes first, then names and shapes.

    `wanted` is a spec that the user's flags ask for, possibly partial; a checkpoint of another
    architecture or width is a UserError that names both. So is one of a builder that only the file names: such code
    is never imported, torchvision's own aside.
    """
    content = read(path)
    found, stated = tensors_in(content, path), content.get("model")
    if own := own_spec(stated, wanted or {}, path):
        spec: Spec = own
        tensors = tensors_of_own(own, found, path)
    else:
        with naming(path):
            spec, fitted = identify(found, stated, wanted)
        _say_notes(path, fitted)
        expected, tensors = expected_state_dict(spec), fitted.tensors
        check_values(tensors, expected, set(expected), path)
    extra = {key: value for key, value in content.items() if type(key) is str and key not in ("model", "state_dict")}
    extra = _usable(extra) if "state_dict" in content else {}
    if len(extra.get("classes", ())) != spec.get("num_classes"):
        extra.pop("classes", None)
    return Checkpoint(path, spec, tensors, extra)


def own_spec(stated: object, wanted: Spec, path: Path) -> dict[str, Any] | None:
    """The spec of the user's own network that flags or the file name; None where neither names one.

    The flags' builder goes before the file's, and each of their arguments too. A builder that only the file names is
    a UserError, unless it may be called; arguments that choose weights are taken from the flags alone.
    """
    says = stated if _says_own(stated) else {}
    name = wanted.get("name") or says.get("name", "")
    if not is_own(name):
        return None
    arguments = {**without_weights(says.get("arguments", {})), **wanted.get("arguments", {})}
    if "name" not in wanted and not may_be_called(name):
        given = ["--model-args", *(f"{key}={value}" for key, value in arguments.items())] if arguments else []
        raise UserError(
            f"{path} holds a network that {name} builds, and code that only a file names is not imported: "
            f"if you know that code, pass {shlex.join(['--model', name, *given])}"
        )
    known = {"num_classes": says["num_classes"]} if type(says.get("num_classes")) is int else {}
    return {"name": name, "arguments": arguments} | known


def _says_own(stated: object) -> TypeGuard[Spec]:
    """Whether a file says of its network what a stage here says of one of the user's own."""
    if not isinstance(stated, Mapping) or type(stated.get("name")) is not str or not is_own(stated["name"]):
        return False
    arguments = stated.get("arguments", {})
    return isinstance(arguments, Mapping) and all(type(key) is str for key in arguments)


def tensors_of_own(spec: Spec, found: Mapping[str, Tensor], path: Path) -> OrderedDict[str, Tensor]:
    """The tensors of the network that `spec` describes, the user's own; UserError if they do not fit it."""
    network = build(spec)
    expected = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    for name, tensor in expected.items():
        if is_lazy(tensor):  # of any shape
            expected[name] = next((t for n, t in found.items() if unwrapped(n).endswith(name)), torch.empty(0))
    fitted = fit(expected, found)
    if fitted.differences:
        raise UserError(f"{path} does not fit what {spec['name']} builds: {first(fitted.differences)}")
    _say_notes(path, fitted)
    weights = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    check_values(fitted.tensors, expected, weights, path)
    return fitted.tensors


def _say_notes(path: Path, fitted: Fit) -> None:
    for note in fitted.notes:
        narrate(f"{path}: {note}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Identify the network in the file `path` in here: what is wrong with it becomes a UserError that names it."""
    try:
        yield
    except OtherNetwork as error:
        raise UserError(f"{path} {error}") from None
    except ValueError as error:
        raise UserError(
            f"{path}: {error}; {another(path)}; a network of your own needs --model module:function"
        ) from None


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
