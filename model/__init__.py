"""The networks: one row of facts each (`registry`), their builders, and which network a file holds (`identify`).

A network is described by its *spec*, a plain dict with the builder's name and arguments, for example
`{"name": "cifar_micronet", "depth": 3.25, "width": 1.89, "num_classes": 100}`; one of the user's own is, for example,
`{"name": "torchvision.models:resnet18", "arguments": {"num_classes": 10}, "num_classes": 10}`. Checkpoints carry it.
Importing this package does not import torch, so that command lines are parsed at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from model.own import build_own, is_own
from model.registry import ROWS, Spec, row_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ROWS", "Spec", "build", "named", "row_of"]


def named(reference: str) -> Any:
    """What `module:attribute` names; the attribute may have dots. ImportError or AttributeError if there is none."""
    module, _, attributes = reference.partition(":")
    found = import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def build(spec: Spec) -> nn.Module:
    """Build the network that `spec` describes, with fresh weights; KeyError for an unknown name.

    One of the user's own has the weights that its builder gives it; see `model.own.build_own` for errors.
    """
    if is_own(spec["name"]):
        return build_own(spec["name"], spec.get("arguments", {}))
    row = row_of(spec["name"])
    return named(row.builder)(**row.fixed, **{key: value for key, value in spec.items() if key != "name"})
