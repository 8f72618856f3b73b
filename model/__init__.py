"""The networks: one row of facts each (`registry`), their builders, and which network a file holds (`identify`).

A network is described by its *spec*, a plain dict with the builder's name and arguments, for example
`{"name": "cifar_micronet", "depth": 3.25, "width": 1.89, "num_classes": 100}`. Checkpoints carry it.
Importing this package does not import torch, so that command lines are parsed at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from model.registry import ROWS, row_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ROWS", "build", "named", "row_of"]


def named(reference: str) -> Any:
    """What `module:attribute` names; the attribute may have dots. ImportError or AttributeError if there is none."""
    module, _, attributes = reference.partition(":")
    found = import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def build(spec: Mapping) -> nn.Module:
    """Build the network that `spec` describes, with fresh random weights; KeyError for an unknown name."""
    row = row_of(spec["name"])
    return named(row.builder)(**row.fixed, **{key: value for key, value in spec.items() if key != "name"})
