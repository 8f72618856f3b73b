"""Which network is scored: of a checkpoint, of a packed file, or what the user's own builder builds."""

import importlib
import importlib.util
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from engine.program.errors import UserError, is_out_of_memory
from engine.store.checkpoint import Checkpoint, naming, read_network, read_state_dict
from engine.store.formats import is_packed
from model import Spec
from model.identify import check_wanted
from model_scoring.packed_network import is_own
from model_scoring.packing import read_packed
from rulers.graph import initialized, trace


@dataclass(frozen=True)
class Wanted:
    """Which network is asked for.

    Attributes:
        spec: possibly partial; see `engine.program.network_flags`.
        arguments: of the user's own builder.
        shapes: of the inputs, as `rulers.count` takes them; None for images.
    """

    spec: Spec
    arguments: Mapping[str, Any] = field(default_factory=dict)
    shapes: list[Any] | None = None

    @property
    def builder(self) -> str | None:
        """The user's own builder, `module:function` or `file.py:function`."""
        name = self.spec.get("name", "")
        return name if ":" in name else None


@contextmanager
def running(wanted: Wanted, image_size: int) -> Iterator[None]:
    """What a user's own network makes of an input that it does not fit is an error of the user's."""
    try:
        yield
    except Exception as error:
        if not (wanted.builder or wanted.shapes) or is_out_of_memory(error):
            raise
        inputs = said(wanted.shapes) if wanted.shapes else f"an image of {image_size} px"
        raise UserError(
            f"--model {wanted.spec.get('name', '')} does not run on {inputs} ({_reason(error)}); "
            "pass --image-size or --input-shape"
        ) from None


def _reason(error: Exception) -> str:
    """What an exception says, on one line, and its kind unless that goes without saying."""
    plain = isinstance(error, ImportError | AttributeError | TypeError | ValueError | RuntimeError)
    text = " ".join(str(error).split())[:200]
    return text if plain and text else f"{type(error).__name__}: {text}"


def said(shapes: list[Any]) -> str:
    """Shapes of inputs as `--input-shape` has them."""
    sides = (shape.shape[1:] if isinstance(shape, Tensor) else shape for shape in shapes)
    return ", ".join("x".join(map(str, shape)) for shape in sides)


def examples(shapes: list[tuple[tuple[int, ...], str | None]]) -> list[Any] | None:
    """What `--input-shape` asks for, as `rulers.count` takes it; None if nothing."""
    return [torch.zeros(1, *shape, dtype=getattr(torch, dtype)) if dtype else shape for shape, dtype in shapes] or None


def load(path: Path | None, wanted: Wanted, image_size: int | None) -> tuple[Checkpoint, nn.Module]:
    """Read the network that `path` holds, in evaluation mode; without a path, the user's own as it is built.

    `image_size` is that at which a network of the user's own is asked how many classes it has, pixels; 32 if None.
    """
    if wanted.builder:
        network = own_network(wanted.builder, wanted.arguments).eval()
        with running(wanted, image_size or 32):
            network = initialized(network, wanted.shapes or image_size or 32)
        if path:
            found = read_packed(path).state_dict if is_packed(path) else None
            _load(read_state_dict(path, network, wanted.builder, found), network, path)
        classes = number_of_outputs(network, wanted, image_size or 32)
        spec = {"name": wanted.builder, "arguments": dict(wanted.arguments), "num_classes": classes}
        return Checkpoint(path or Path(wanted.builder), spec, network.state_dict()), network
    assert path is not None  # built-in networks are read
    if is_packed(path):
        checkpoint = read_packed(path)
        if is_own(checkpoint.spec):
            raise UserError(f"{path}: holds a network of {checkpoint.spec['name']}; pass --model, and --model-args")
        with naming(path):
            check_wanted(wanted.spec, checkpoint.spec, checkpoint.state_dict)
    else:
        checkpoint = read_network(path, wanted.spec)
    return checkpoint, checkpoint.network().eval()


def _load(state_dict: dict[str, Tensor], network: nn.Module, path: Path) -> None:
    """Load tensors that fit, as of the versions of modules that the file tells, or else of today's."""
    if not hasattr(state_dict, "_metadata"):
        state_dict = OrderedDict(state_dict)
        vars(state_dict)["_metadata"] = vars(network.state_dict())["_metadata"]
    try:
        network.load_state_dict(state_dict, strict=False)
    except (RuntimeError, ValueError) as error:  # a network's own code may refuse what fits
        reason = " ".join(str(error).split())
        raise UserError(f"{path} can't be loaded into the network ({reason}); save its state_dict again") from None


def own_network(builder: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the user's own `module:function`, found in the current folder or on Python's path."""
    module, _, function = builder.rpartition(":")
    try:
        found: Any = _module(module)
        for name in function.split("."):
            found = getattr(found, name)
        network = found(**arguments)
    except Exception as error:  # whatever the user's code makes of it
        if is_out_of_memory(error):
            raise
        given = f"these arguments ({', '.join(arguments)})" if arguments else "no arguments; --model-args passes some"
        raise UserError(f"--model {builder}: {_reason(error)}; it must name a function that takes {given}") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"--model {builder} built a {type(network).__name__}, not a torch.nn.Module")
    return network


def _module(name: str) -> ModuleType:
    """The module `name`, or of the file `name`; what lies in the current folder goes before packages of that name."""
    here = Path.cwd()
    file = Path(name) if name.endswith(".py") else here / (name.replace(".", "/") + ".py")
    package = here / name.replace(".", "/") / "__init__.py"
    folder = file.resolve().parent if name.endswith(".py") else here
    sys.path.insert(0, str(folder))
    if name.endswith(".py") and not file.is_file():
        raise FileNotFoundError(f"no file {name}")
    source = next((path for path in (file, package) if path.is_file()), None)
    known = sys.modules.get(name)
    if source is None or (known and getattr(known, "__file__", None) == str(source)):
        return importlib.import_module(name)
    within = [str(source.parent)] if source is package else None
    alias = f"own_{name}".replace("/", "_").replace(".", "_")
    spec = importlib.util.spec_from_file_location(alias, source, submodule_search_locations=within)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module {name}")
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def number_of_outputs(network: nn.Module, wanted: Wanted, image_size: int) -> int:
    """How many logits a user's own network gives: the last dimension of its first output; 1 without any."""
    with running(wanted, image_size):
        outputs = trace(network, wanted.shapes or image_size)[-1].inputs
    return outputs[0].shape[-1] if outputs and outputs[0].shape else 1
