"""Networks of the user's own: `module:function` or `file.py:function` builds one, and one image tells how it runs."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

TRUSTED = "torchvision.models"  # the module of builders that a file may name: other code that it names is not run
PRETRAINED = ("weights", "pretrained")  # arguments of builders that choose values, not the network


class OwnCodeError(Exception):
    """What the user's own code makes of its arguments or of an image, in one line that says what to do."""


_built: set[str] = set()  # builders that the user named to this process


def is_own(name: str) -> bool:
    """Whether `name` is a builder of the user's own, not a built-in network."""
    return ":" in name


def may_be_called(builder: str) -> bool:
    """Whether a builder that a file names may be called: one that the user named, or that torchvision lists.

    What else can be reached from torchvision's modules may not: `os.system` is among it.
    """
    module, _, function = builder.partition(":")
    if builder in _built or module != TRUSTED:
        return builder in _built
    from torchvision import models

    return function in models.list_models(module=models)


def label_of(builder: str) -> str:
    """A short name for files: the function's."""
    return builder.rpartition(":")[2].rpartition(".")[2]


def build_own(builder: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the user's own `module:function`, found in the current folder or on Python's path.

    OwnCodeError where it can't be found or called, or builds no module; MemoryError and the like pass through.
    """
    from torch import nn

    try:
        network = _function(builder)(**arguments)
    except Exception as error:  # whatever the user's code makes of it
        _pass_memory_errors(error)
        given = f"these arguments ({', '.join(arguments)})" if arguments else "no arguments; --model-args passes some"
        raise OwnCodeError(f"--model {builder}: {reason(error)}; it must name a function that takes {given}") from None
    _built.add(builder)
    if not isinstance(network, nn.Module):
        raise OwnCodeError(f"--model {builder} built a {type(network).__name__}, not a torch.nn.Module")
    return network


def takes(builder: str, argument: str) -> bool:
    """Whether a builder that `build_own` called takes the keyword `argument`."""
    try:
        parameters = inspect.signature(_function(builder)).parameters.values()
    except (TypeError, ValueError):  # some callables have none
        return False
    return any(p.name == argument or p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)


@dataclass(frozen=True)
class Run:
    """What one image shows of a network.

    Attributes:
        layers: the modules that have parameters of their own, in the order in which they first ran.
        outputs: what the network returned.
    """

    layers: list[nn.Module]
    outputs: Any

    @property
    def classes(self) -> int:
        """The number of logits; OwnCodeError where the network returns anything but one tensor `[N, classes]`."""
        from torch import Tensor

        if isinstance(self.outputs, Tensor) and self.outputs.ndim == 2:
            return self.outputs.shape[1]
        found = list(self.outputs.shape) if isinstance(self.outputs, Tensor) else type(self.outputs).__name__
        raise OwnCodeError(f"the network returns {found}, not logits [N, classes]; wrap it in a builder that does")


@contextmanager
def every_operation() -> Iterator[None]:
    """Let attention run operation by operation: torch's fast path takes whole blocks, without their modules."""
    import torch

    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def run_once(network: nn.Module, image_size: int) -> Run:
    """Run `network`, which is afterwards in evaluation mode, on a grey image; its lazy modules know their sizes then.

    OwnCodeError where it does not run on RGB images `[N, 3, image_size, image_size]`.
    """
    import torch

    network.eval()
    layers: dict[nn.Module, None] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, _: layers.setdefault(module))
        for module in network.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), every_operation():
            outputs = network(torch.zeros(1, 3, image_size, image_size, device=device))
    except Exception as error:  # whatever the user's code makes of it
        _pass_memory_errors(error)
        raise OwnCodeError(
            f"the network does not run on an image of {image_size} px ({reason(error)}); pass another --image-size"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    return Run(list(layers), outputs)


def reason(error: Exception) -> str:
    """What an exception says, on one line, and its kind unless that goes without saying."""
    plain = isinstance(error, ImportError | AttributeError | TypeError | ValueError | RuntimeError)
    text = " ".join(str(error).split())[:200]
    return text if plain and text else f"{type(error).__name__}: {text}"


def _pass_memory_errors(error: Exception) -> None:
    """Raise `error` if it says that there is not enough memory, which is not what the code is wrong in."""
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        raise error


def _function(builder: str) -> Any:
    module, _, function = builder.rpartition(":")
    found: Any = _module(module)
    for name in function.split("."):
        found = getattr(found, name)
    return found


def _module(name: str) -> ModuleType:
    """The module `name`, or of the file `name`; what lies in the current folder goes before packages of that name."""
    if name == TRUSTED:  # the installed one, whatever lies in the current folder
        return importlib.import_module(name)
    here = Path.cwd()
    file = Path(name) if name.endswith(".py") else here / (name.replace(".", "/") + ".py")
    package = here / name.replace(".", "/") / "__init__.py"
    folder = file.resolve().parent if name.endswith(".py") else here
    if str(folder) not in sys.path[:1]:
        sys.path.insert(0, str(folder))
    if name.endswith(".py") and not file.is_file():
        raise FileNotFoundError(f"no file {name}")
    source = next((path for path in (file, package) if path.is_file()), None)
    if source is None:
        return importlib.import_module(name)
    alias = f"own_{name}".replace("/", "_").replace(".", "_")
    for known in (sys.modules.get(name), sys.modules.get(alias)):
        if known and getattr(known, "__file__", None) == str(source):
            return known
    within = [str(source.parent)] if source is package else None
    spec = importlib.util.spec_from_file_location(alias, source, submodule_search_locations=within)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module {name}")
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
