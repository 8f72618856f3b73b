"""Which network a file holds: what it says of itself goes first, then names and shapes alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TypeGuard

import torch
from torch import Tensor

from model import ROWS, build, named
from model.names import Fit, first, fit, mismatches, unwrapped
from model.registry import Row, Spec


class OtherNetwork(ValueError):
    """A file holds another network than the one that is wanted."""


def identify(state_dict: Mapping[str, Tensor], stated: object = None, wanted: Spec | None = None) -> tuple[Spec, Fit]:
    """The spec of the network that `state_dict` belongs to, and the tensors by that network's names.

    Args:
        stated: what the file says of its network; anything but a whole spec is other programs' business.
        wanted: a spec, possibly partial, that the network must have.

    Raises ValueError, without the file's name, where no known network fits; OtherNetwork, which names both, where
    the network that fits is not the wanted one.
    """
    spec: Spec | None
    if is_spec(stated):
        spec = dict(stated)
        fitted = _fit_stated(spec, state_dict)
    else:
        spec, differences = nearest(state_dict)
        if spec is None or differences:
            hint = f"; nearest is {describe(spec)}, but {first(differences)}" if spec else ""
            raise ValueError(f"the tensors fit none of the known networks ({', '.join(ROWS)}){hint}")
        fitted = fit(expected_state_dict(spec), state_dict)
    if wanted:
        check_wanted(wanted, spec, fitted.tensors)
    return spec, fitted


def is_spec(stated: object) -> TypeGuard[Spec]:
    """Whether `stated` is a whole spec of a built-in network."""
    if not isinstance(stated, Mapping) or not all(isinstance(value, int | float | str) for value in stated.values()):
        return False
    row = ROWS.get(stated.get("name", ""))
    return row is not None and stated.keys() >= set(row.arguments)


def describe(spec: Spec) -> str:
    """Say a spec as the flags that ask for it."""
    if "depth" in spec:
        return f"--model {spec['name']} --dw-multps {spec['depth']:.9g} {spec['width']:.9g} --phi 1"
    return f"--model {spec['name']}"


def check_wanted(wanted: Spec, spec: Spec, state_dict: Mapping[str, Tensor]) -> None:
    """Raise OtherNetwork if the spec `wanted`, possibly partial, asks for another network than `spec`."""
    if wanted.get("name", spec["name"]) != spec["name"]:
        asked = f"--model {wanted['name']}: leave that out"
    else:
        merged = {**spec, **{key: value for key, value in wanted.items() if key in spec}}
        if not mismatches(expected_state_dict(merged), state_dict):
            return
        asked = f"{describe(merged)}: leave those out"
    raise OtherNetwork(f"holds {describe(spec)}, but the flags ask for {asked}")


def nearest(state_dict: Mapping[str, Tensor]) -> tuple[Spec | None, list[str]]:
    """Return the spec whose names and shapes come closest to `state_dict`, None if none does, and how they differ.

    Multipliers of MicroNet are the shortest decimals that give the same blocks and channels. What `fit` mends is no
    difference, and counters of BatchNorm (`num_batches_tracked`), which old files lack, do not matter.
    """
    best: tuple[Spec | None, list[str]] = None, []
    for row in ROWS.values():
        for spec in _guesses(row, state_dict):
            differences = fit(expected_state_dict(spec), state_dict).differences
            if not differences:
                return spec, []
            if best[0] is None or len(differences) < len(best[1]):
                best = spec, differences
    return best if best[0] else _nearest_renamed(state_dict)


def _guesses(row: Row, state_dict: Mapping[str, Tensor]) -> Iterator[Spec]:
    """Specs of the network `row`, one for each prefix under which the state dict has its classifier."""
    classifier, tried = row.fingerprint.classifier, set()
    for name in [name for name in state_dict if unwrapped(name).endswith(classifier)][:8]:
        prefix = unwrapped(name).removesuffix(classifier)
        if prefix in tried or (prefix and not prefix.endswith(".")):
            continue
        tried.add(prefix)
        names = ((unwrapped(name), tensor) for name, tensor in state_dict.items())
        inside = {name.removeprefix(prefix): tensor for name, tensor in names if name.startswith(prefix)}
        if spec := _guess(row, inside):
            yield spec


def _nearest_renamed(state_dict: Mapping[str, Tensor]) -> tuple[Spec | None, list[str]]:
    """As `nearest`, of a state dict that would fit if its classifier, and perhaps other modules, had other names."""
    matrices = [name for name, tensor in state_dict.items() if tensor.ndim == 2 and name.endswith("weight")]
    for row in ROWS.values() if matrices else ():
        last, classifier = matrices[-1].removesuffix("weight"), row.fingerprint.classifier.removesuffix("weight")
        renamed = {
            unwrapped(classifier + name.removeprefix(last) if name.startswith(last) else name): tensor
            for name, tensor in state_dict.items()
        }
        if spec := _guess(row, renamed):
            fitted = fit(expected_state_dict(spec), state_dict)
            if fitted.renaming:
                return spec, fitted.differences
    return None, []


def expected_state_dict(spec: Spec) -> dict[str, Tensor]:
    """Names and shapes of the built-in network that `spec` describes, as tensors that take no memory."""
    return dict(_meta_tensors(json.dumps(spec)))


@lru_cache(maxsize=32)
def _meta_tensors(spec: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build(json.loads(spec)).state_dict()


def _fit_stated(spec: Spec, state_dict: Mapping[str, Tensor]) -> Fit:
    try:
        fitted = fit(expected_state_dict(spec), state_dict)
    except Exception as error:  # whatever the odd arguments in the file lead to
        reason = str(error).partition("\n")[0]
        raise ValueError(f"says that it is {spec}, which can't be built ({reason})") from None
    if fitted.differences:
        raise ValueError(f"says that it is {describe(spec)}, but {first(fitted.differences)}")
    return fitted


def _guess(row: Row, state_dict: Mapping[str, Tensor]) -> Spec | None:
    """A spec of the network `row` that is worth building; None where the state dict is obviously another's."""
    mark = row.fingerprint
    classifier = state_dict.get(mark.classifier)
    if classifier is None or classifier.ndim != 2:
        return None
    if not all(_any_matches(state_dict, p) for p in mark.has) or any(_any_matches(state_dict, p) for p in mark.lacks):
        return None
    arguments = named(mark.arguments)(row.name, state_dict) if mark.arguments else {}
    return None if arguments is None else {"name": row.name, **arguments, "num_classes": classifier.shape[0]}


def _any_matches(names: Mapping[str, object], pattern: str) -> bool:
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)
