"""Small networks and what the tests of packed files ask of them."""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from engine.store.checkpoint import Checkpoint
from helpers.networks import reference_state
from model import build
from model_scoring import packing
from model_scoring.packing import PackReport, read_packed, write_packed

TINY = {"name": "cifar_micronet", "depth": 0.1, "width": 0.1, "num_classes": 2}  # 8 channels, 3 blocks
EXTRA = {"dataset": "CIFAR10", "image_size": 32, "accuracy": 91.01}
TERNARY, REPEATED, BOOK = "layer1.0.conv1.weight", "layer2.0.conv2.weight", "layer3.0.conv2.weight"  # tensors of TINY
DENSE, VARIANCE = "linear.weight", "bn1.running_var"
OWN = {"name": "nets:own", "arguments": {"width": 2}, "num_classes": 3}


@functools.cache
def reference_tensors(name: str) -> dict[str, Tensor]:
    """The tensors of a reference checkpoint; shared, so not to be changed."""
    network = build(TINY if name == "tiny" else {"name": name})
    return reference_state(network, name)


def tiny(changed: dict[str, Tensor] | None = None, extra: dict | None = None) -> Checkpoint:
    tensors = reference_tensors("tiny") | (changed or {})
    return Checkpoint(Path("tiny.pt"), dict(TINY), tensors, extra or EXTRA)


def mixed() -> Checkpoint:
    """A small network with tensors of every kind, one of them ternary and not range coded."""
    sparse = reference_tensors("tiny")["conv1.weight"].clone()
    sparse[::2] = 0
    book = torch.tensor([0.0, 0.1, -0.3, 1.23])[torch.arange(576) % 5 % 4].view(8, 8, 3, 3)
    repeated = reference_tensors("tiny")[REPEATED].reshape(-1)[:48].repeat(12).view(8, 8, 3, 3)
    return tiny({"conv1.weight": sparse, VARIANCE: torch.linspace(1, 1e6, 8), BOOK: book, REPEATED: repeated})


def same_bytes(first: Tensor, second: Tensor) -> bool:
    same_kind = first.dtype == second.dtype and first.shape == second.shape
    return same_kind and first.numpy().tobytes() == second.numpy().tobytes()


def restored(source: Checkpoint, folder: Path) -> tuple[Checkpoint, PackReport]:
    report = write_packed(source, folder / "packed.safetensors")
    return read_packed(folder / "packed.safetensors"), report


def layer_of(report: PackReport, name: str) -> packing.PackedLayer:
    return next(layer for layer in report.layers if layer.name == name)


@contextmanager
def allocating_less_than(limit: int) -> Iterator[None]:
    """Python's and numpy's memory at its highest, in bytes; tensors are made from numpy's arrays here."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
