"""The packed file: exact sizes, its report, and what is written of a checkpoint."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor

from engine.program.errors import UserError
from engine.store import checkpoint
from engine.store.checkpoint import Checkpoint, network_content, read_network
from engine.store.formats import is_packed
from engine.store.values import stored_values
from helpers.packed_files import (
    DENSE,
    OWN,
    TINY,
    VARIANCE,
    layer_of,
    mixed,
    reference_tensors,
    restored,
    tiny,
)
from model import build
from model_scoring import container
from model_scoring.container import ENTRY
from model_scoring.packing import Kind, write_packed

# -------------------------------------------------------------------------------------- kinds, sizes, report


def dense(*values: float) -> Tensor:
    """A weight [2, 8] with sixteen values, the last ones those given."""
    return torch.cat([torch.arange(1.0, 17.0 - len(values)), torch.tensor(values)]).view(2, 8)


@pytest.mark.parametrize(
    ("name", "tensor", "kind", "size"),
    [
        (DENSE, dense(), Kind.GRID, 16),  # k * 1.0
        (DENSE, dense().sqrt(), Kind.HALF, 32),
        (DENSE, dense(0.0).sqrt(), Kind.HALF, 32),
        (DENSE, dense(0.0, 0.0).sqrt(), Kind.SPARSE, 2 + 2 * 14),  # the mask takes 2 bytes
        (DENSE, dense(65504.0), Kind.HALF, 32),
        (DENSE, dense(65505.0), Kind.RAW, 64),
        (DENSE, dense(1e-30).sqrt(), Kind.HALF, 32),
        (DENSE, 2**-16 * dense().sqrt(), Kind.HALF, 32),
        (DENSE, 2**-20 * (dense() + 1 / 3), Kind.RAW, 64),
        (DENSE, torch.zeros(2, 8), Kind.SPARSE, 2),
        (DENSE, torch.full((2, 8), 7.0), Kind.GRID, 1),
        (DENSE, 1 + 1e-6 * dense(), Kind.GRID, 1),  # rounding makes it so
        (VARIANCE, torch.ones(8), Kind.GRID, 1),
        (VARIANCE, torch.zeros(8), Kind.SPARSE, 1),
        (VARIANCE, torch.full((8,), 1e5), Kind.GRID, 1),
        (VARIANCE, torch.linspace(1, 1e5, 8), Kind.RAW, 32),
    ],
)
def test_kind_and_size_of_a_tensor(name: str, tensor: Tensor, kind: Kind, size: int, tmp_path: Path) -> None:
    after, report = restored(tiny({name: tensor}), tmp_path)
    layer = layer_of(report, name)
    assert (layer.kind, layer.bytes, layer.weights) == (kind, size, tensor.numel())
    assert torch.equal(after.state_dict[name], stored_values(tensor))


def test_sizes_of_the_file_add_up(packed: bytes, tmp_path: Path) -> None:
    source = mixed()
    report = write_packed(source, tmp_path / "a")
    content = container.open_sealed(packed)
    streams = container.streams_of(content, 10**6)
    by_kind = {kind: [layer for layer in report.layers if layer.kind == kind] for kind in Kind}
    nonzero = [int(source.state_dict[layer.name].count_nonzero()) for layer in by_kind[Kind.SPARSE]]
    halves = sum(layer.weights for layer in by_kind[Kind.HALF]) + sum(nonzero)
    symbols = {key: streams.pop(key).nbytes for key in ("symbols", "sizes", "depths", "words")}
    assert {key: stream.nbytes for key, stream in streams.items()} == {
        "kinds": len(report.layers),
        "half": 2 * halves,
        "masks": sum(-(-layer.weights // 8) for layer in by_kind[Kind.SPARSE]),
        "raw": 4 * 8 + 4 * 4,
        "levels": len(report.quantized),
        "coders": len(report.quantized),
        "steps": 8 * len(by_kind[Kind.GRID]),
    }
    assert min(symbols.values()) > 0 and report.symbol_bytes <= sum(symbols.values()) - symbols["sizes"]
    assert abs(report.symbol_bytes - sum(layer.bytes for layer in report.quantized)) < 0.05 * report.symbol_bytes
    header = 8 + int.from_bytes(packed[:8], "little")
    assert len(packed) == header + sum(array.size for array in content.arrays.values())
    assert report.file_bytes == len(packed) == report.path.stat().st_size
    assert header < 300


def test_the_report_says_what_the_same_values_take_otherwise(tmp_path: Path) -> None:
    weight = torch.tensor([0.0, 0.0, 0.5, -0.25] * 16).view(8, 8, 1, 1)
    name = "layer2.0.shortcut.0.weight"
    _, report = restored(tiny({name: weight}), tmp_path)
    assert layer_of(report, name).entropy_bytes == 64 * 1.5 / 8
    floats = [tensor for tensor in reference_tensors("tiny").values() if tensor.is_floating_point()]
    assert report.float32_bytes == 4 * sum(tensor.numel() for tensor in floats)
    assert report.entropy_bytes == pytest.approx(sum(layer.entropy_bytes for layer in report.quantized))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_a_resnet20_takes_less_than_its_symbols_entropy_and_16_bit_a_value(bits: int, tmp_path: Path) -> None:
    tensors, number = dict(reference_tensors("resnet20")), 2 ** (bits - 1) - 1
    for name, tensor in tensors.items() if bits > 2 else ():
        if tensor.ndim == 4:
            drawn = torch.randn_like(tensor)
            step = drawn.abs().max() / number
            tensors[name] = (drawn / step).round() * step
    after, report = restored(Checkpoint(Path("x"), {"name": "resnet20", "num_classes": 10}, tensors), tmp_path)
    rest = 2 * sum(layer.weights for layer in report.layers if layer not in report.quantized)
    convolutions = [layer for layer in report.quantized if layer.weights > 300]
    assert len(convolutions) == 18 + (bits > 2)
    assert all(torch.equal(after.state_dict[layer.name], tensors[layer.name]) for layer in convolutions)
    assert report.symbol_bytes < 1.02 * report.entropy_bytes
    assert report.file_bytes < report.symbol_bytes + rest


# ------------------------------------------------------------------------------------------------- writing


def test_only_small_entries_of_the_right_type_are_kept(tmp_path: Path) -> None:
    extra = {"dataset": "x", "image_size": -32, "accuracy": 1.5, "arguments": {}}
    after, _ = restored(tiny(extra=extra), tmp_path)
    assert after.extra == {"accuracy": 1.5}


@pytest.mark.parametrize(
    ("spec", "changed", "message"),
    [
        (TINY, {DENSE: torch.zeros(3, 8)}, "linear.weight is 3x8 where 2x8 is needed"),
        (TINY, {"other": torch.zeros(3)}, "other is not of this network"),
        ({"name": "resnet20", "num_classes": 10}, {}, "resnet20, but"),
        ({"name": "resnet20"}, {}, "describes no network"),
        (TINY, {DENSE: torch.full((2, 8), torch.nan)}, "linear.weight holds NaN"),
        (TINY, {DENSE: torch.full((2, 8), 1e300, dtype=torch.float64)}, "linear.weight holds NaN or"),
        (TINY | {"depth": 33.0}, {}, "depth multiplier 33 is not"),
        (TINY | {"width": 0.0}, {}, "describes no network"),
        (TINY | {"name": "resnet21"}, {}, "'resnet21'"),
        (OWN | {"num_classes": 0}, {}, "describes no network"),
        (OWN | {"name": "nets"}, {}, "describes no network"),
        (OWN | {"arguments": [1]}, {}, "describes no network"),
        (OWN | {"more": 1}, {}, "describes no network"),
        (OWN | {"arguments": {"a": {1}}}, {}, "x: its description can't be written"),
        (OWN | {"arguments": {"a": "a" * 2**20}}, {}, "x: its description can't be written"),
        (OWN, {"a": torch.empty(2**28 + 1).new_zeros(1).expand(2**28 + 1)}, "x: more than 16,384 tensors or 1,073,"),
        (OWN | {"arguments": {"a": math.inf}}, {}, "x: its description can't be written"),
        (OWN, {"a": torch.eye(3).to_sparse()}, "x: a is torch.sparse_coo of torch.float32; packed files hold plain"),
    ],
)
def test_what_can_not_be_read_is_not_written(spec: dict, changed: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "target"
    path.write_bytes(b"before")
    with pytest.raises(UserError, match=re.escape(message)):
        write_packed(Checkpoint(Path("x"), spec, reference_tensors("tiny") | changed), path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "target"
    path.write_bytes(b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_packed(tiny(), path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_packed_files_are_told_by_their_content(packed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "network.pt"
    path.write_bytes(packed)
    assert is_packed(path)
    checkpoint.save(network_content(TINY, build(TINY)), path)
    assert not is_packed(path) and read_network(path).spec == TINY
    for content in (safetensors.numpy.save({"a": np.zeros(3)}), b"", packed[:8], f'"{ENTRY}"'.encode()):
        path.write_bytes(content)
        assert not is_packed(path)
    assert not is_packed(tmp_path / "none") and not is_packed(tmp_path)
