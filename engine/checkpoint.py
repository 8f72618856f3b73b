"""Checkpoints: read safely whatever the file is, written so that no moment leaves half a file.

A checkpoint is a dict with `state_dict` (plain names) and `model` (the network's spec, see `model.build`), and
with what the stage that wrote it adds. Bare state dicts, `module.` prefixes and the 2019 layout are read too.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import UserError
from model import MICRONETS, MODELS, build
from model.identify import identify, mismatches

SUFFIXES = (".pt", ".pth", ".th", ".tar")


@dataclass
class Checkpoint:
    """A network on disk: its spec, its tensors on the CPU, and whatever else the file holds."""

    path: Path
    spec: dict
    state_dict: dict[str, Tensor]
    extra: dict = field(default_factory=dict)

    def network(self) -> nn.Module:
        """Build the network and load the tensors."""
        network = build(self.spec)
        network.load_state_dict(self.state_dict, strict=False)  # names and shapes were checked on reading
        return network

    def check_classes(self, classes: list[str], dataset: str, data_path: str) -> None:
        """Raise a UserError unless the network tells as many classes apart as the data set has."""
        if len(classes) != self.spec["num_classes"]:
            raise UserError(
                f"{self.path} tells {self.spec['num_classes']} classes apart, but {dataset} in {data_path} has "
                f"{len(classes)}; pass the --dataset and --data-path that the network was trained on"
            )


def save(content: dict, path: Path) -> None:
    """Write `content` with torch.save: to a temporary file beside `path`, flushed, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(_canonical(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _canonical(content):
    """`content` in plain containers that share nothing, so that equal content gives equal bytes when pickled."""
    if isinstance(content, Mapping):
        return {_canonical(key): _canonical(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_canonical(value) for value in content)
    return sys.intern(content) if type(content) is str else content


def network_content(spec: dict, network: nn.Module, **extra) -> dict:
    """The content of a checkpoint of `network`: tensors on the CPU, in the default memory layout."""
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in network.state_dict().items()}
    return {"model": dict(spec), "state_dict": tensors, **extra}


def copy(source: Path, target: Path) -> None:
    """Copy a checkpoint as safely as `save` writes one."""
    save(read(source), target)


def wanted_spec(model: str | None, dw_multps: list[float] | None, phi: float | None) -> dict:
    """The part of a spec that `--model`, `--dw-multps` and `--phi` ask for; flags left out ask for nothing."""
    spec = {"name": model} if model else {}
    if dw_multps or phi is not None:
        depth, width = dw_multps or (1.4, 1.2)
        exponent = 3.5 if phi is None else phi
        spec |= {"depth": depth**exponent, "width": width**exponent}
    return spec


def find(name: str, folder: Path) -> Path:
    """Return the file `name`, a path or a bare name in `folder`; UserError lists the folder if there is none."""
    for path in (folder / name, Path(name)):
        if path.is_file():
            return path
    there = sorted(path.name for path in folder.glob("*") if path.suffix in SUFFIXES)
    listing = f"it holds {', '.join(there)}" if there else "it holds no checkpoints"
    raise UserError(f"no checkpoint {name!r}, neither as a path nor in {folder} ({listing})")


def read(path: Path) -> dict:
    """Read a torch file without executing anything in it; UserError where it is not one, or damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a whole, safely loadable checkpoint ({reason[:120]}); copy it again") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint with a state dict")
    return dict(content)


def read_network(path: Path, wanted: dict | None = None) -> Checkpoint:
    """Read a network's checkpoint; what the file says of itself goes first, then names and shapes.

    `wanted` is a spec that the user's flags ask for, possibly partial; a checkpoint of another
    architecture or width is a UserError that names both.
    """
    content = read(path)
    state_dict = _state_dict(content, path)
    spec = content.get("model") if isinstance(content.get("model"), Mapping) else None
    if spec is not None:
        _check_spec(spec, state_dict, path)
    else:
        spec = identify(state_dict)
        if spec is None:
            raise UserError(f"{path}: the tensors fit none of the known networks ({', '.join(MODELS)})")
    if wanted:
        _check_wanted(wanted, spec, state_dict, path)
    extra = {key: value for key, value in content.items() if key not in ("model", "state_dict")}
    return Checkpoint(path, dict(spec), state_dict, extra if "state_dict" in content else {})


def describe(spec: dict) -> str:
    """Say a spec as the flags that ask for it."""
    if spec["name"] in MICRONETS:
        return f"--model {spec['name']} --dw-multps {spec['depth']:.9g} {spec['width']:.9g} --phi 1"
    return f"--model {spec['name']}"


def _state_dict(content: dict, path: Path) -> dict[str, Tensor]:
    tensors = content
    for key in ("state_dict", "model_state_dict", "net", "model"):
        if isinstance(content.get(key), Mapping) and _all_tensors(content[key]):
            tensors = content[key]
            break
    if not _all_tensors(tensors):
        raise UserError(f"{path}: holds no state dict (found {', '.join(map(str, list(content)[:5])) or 'nothing'})")
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or infinite values; take an earlier checkpoint")
    return tensors


def _all_tensors(tensors: Mapping) -> bool:
    return bool(tensors) and all(isinstance(t, Tensor) and isinstance(name, str) for name, t in tensors.items())


def _check_spec(spec: Mapping, state_dict: dict, path: Path) -> None:
    try:
        with torch.device("meta"):
            expected = build(dict(spec)).state_dict()
    except Exception as error:
        raise UserError(f"{path}: says that it is the network {dict(spec)}, which can't be built ({error})") from None
    if differences := mismatches(expected, state_dict):
        raise UserError(f"{path}: says that it is {describe(dict(spec))}, but {_first(differences)}")


def _check_wanted(wanted: dict, spec: dict, state_dict: dict, path: Path) -> None:
    if wanted.get("name", spec["name"]) == spec["name"]:
        merged = {**spec, **{key: value for key, value in wanted.items() if key in spec}}
        with torch.device("meta"):
            if not mismatches(build(merged).state_dict(), state_dict):
                return
        raise UserError(f"{path} holds {describe(spec)}, but the flags ask for {describe(merged)}: leave those out")
    raise UserError(f"{path} holds {describe(spec)}, but the flags ask for --model {wanted['name']}: leave that out")


def _first(differences: list[str]) -> str:
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    return differences[0] + more
