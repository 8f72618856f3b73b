"""Which network is scored: of a checkpoint, of a packed file, or what the user's own builder builds."""

import importlib
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.program.errors import UserError
from engine.store.checkpoint import Checkpoint, naming, read_network, read_state_dict
from engine.store.formats import is_packed
from model import Spec
from model.identify import check_wanted
from model_scoring.packing import read_packed


def is_own(wanted: Spec) -> bool:
    """Whether the spec `wanted` names the user's own builder, `module:function`."""
    return ":" in wanted.get("name", "")


def load(path: Path, wanted: Spec, image_size: int | None) -> tuple[Checkpoint, nn.Module]:
    """Read the network that `path` holds, in evaluation mode.

    Args:
        wanted: a spec, possibly partial, that the network must have; see `engine.program.network_flags`.
        image_size: at which a network of the user's own is asked how many classes it has, pixels; 32 if None.
    """
    if is_own(wanted):
        builder = wanted["name"]
        network = own_network(builder)
        state_dict = read_state_dict(path, network, builder)
        _load(state_dict, network, path)
        spec = {"name": builder, "num_classes": number_of_outputs(network.eval(), image_size or 32)}
        return Checkpoint(path, spec, state_dict), network
    if is_packed(path):
        checkpoint = read_packed(path)
        with naming(path):
            check_wanted(wanted, checkpoint.spec, checkpoint.state_dict)
    else:
        checkpoint = read_network(path, wanted)
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


def own_network(builder: str) -> nn.Module:
    """Call the user's own `module:function`, found in the current folder or on Python's path."""
    module, _, function = builder.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        network = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--model {builder}: {error}; it must name a function without arguments") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"--model {builder} built a {type(network).__name__}, not a torch.nn.Module")
    return network


@torch.no_grad()
def number_of_outputs(network: nn.Module, image_size: int) -> int:
    """How many logits a user's own network gives for an image."""
    return network(torch.zeros(1, 3, image_size, image_size)).shape[-1]
