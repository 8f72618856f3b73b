"""The tensors of a network among what programs write around them, and whether they are fit to be one's weights."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.program.errors import UserError
from engine.program.report import say
from engine.store.files import another

WEIGHTS = ("state_dict", "model_state_dict", "model_state", "net", "model", "network", "weights", "params", "module")
AVERAGED = re.compile(r"(^|_)ema(_|$)")  # keys of weights that are a moving average of those that are trained
NO_WEIGHTS = re.compile(r"optim|sched|scaler|loss|criterion|rng")


def tensors_in(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
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
        raise UserError(f"{path}: holds no tensors by name (its keys: {keys or 'none'}); {another(path)}")
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


def check_values(
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
