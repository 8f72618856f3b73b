"""Which network is scored: of a checkpoint, of a packed file, or what the user's own builder builds."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from engine.program.errors import UserError
from engine.store.checkpoint import Checkpoint, naming, read_network, read_state_dict
from model.identify import check_wanted, mismatches
from model_scoring.packing import is_packed, read_packed


def is_own(wanted: Mapping) -> bool:
    """Whether the spec `wanted` names the user's own builder, `module:function`."""
    return ":" in wanted.get("name", "")


def load(path: Path, wanted: Mapping, image_size: int | None) -> tuple[Checkpoint, nn.Module]:
    """Read the network that `path` holds, in evaluation mode.

    Args:
        wanted: a spec, possibly partial, that the network must have; see `engine.program.network_flags`.
        image_size: at which a network of the user's own is asked how many classes it has, pixels; 32 if None.
    """
    if is_own(wanted):
        builder = wanted["name"]
        network, state_dict = own_network(builder), read_state_dict(path)
        if differences := mismatches(network.state_dict(), state_dict):
            raise UserError(f"{path} does not fit what {builder} builds: {differences[0]}")
        network.load_state_dict(state_dict, strict=False)
        spec = {"name": builder, "num_classes": number_of_outputs(network.eval(), image_size or 32)}
        return Checkpoint(path, spec, state_dict), network
    if is_packed(path) or path.suffix == ".safetensors":
        checkpoint = read_packed(path)
        with naming(path):
            check_wanted(wanted, checkpoint.spec, checkpoint.state_dict)
    else:
        checkpoint = read_network(path, wanted)
    return checkpoint, checkpoint.network().eval()


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
