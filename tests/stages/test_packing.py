"""The packed file: exact round trips and exact sizes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor

from engine.program.errors import UserError
from engine.store import checkpoint
from engine.store.checkpoint import Checkpoint, network_content, read_network
from engine.store.formats import is_packed
from helpers.packed_files import (
    DENSE,
    EXTRA,
    TERNARY,
    TINY,
    VARIANCE,
    layer_of,
    mixed,
    reference_tensors,
    restored,
    same_bytes,
    tiny,
)
from model import build
from model_scoring.packing import ENTRY, Kind, read_packed, stored_values, write_packed

# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", ["tiny", "resnet20", "efficientnet-b1"])
def test_networks_are_restored(name: str, tmp_path: Path) -> None:
    spec = TINY if name == "tiny" else {"name": name, "num_classes": 1000 if name.startswith("efficientnet-b") else 10}
    tensors = reference_tensors(name)
    after, report = restored(Checkpoint(Path("x.pt"), spec, tensors, EXTRA | {"centroids": [1.0]}), tmp_path)
    assert after.spec == spec and after.extra == EXTRA and after.path == tmp_path / "packed.safetensors"
    assert list(after.state_dict) == [key for key in tensors if not key.endswith("num_batches_tracked")]
    for key, tensor in after.state_dict.items():
        assert same_bytes(tensor, stored_values(tensors[key]))
    assert sum(same_bytes(after.state_dict[layer.name], tensors[layer.name]) for layer in report.ternary) >= 6
    loaded = after.network().state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in after.state_dict.items())


def test_packing_twice_gives_the_same_file(tmp_path: Path, packed: bytes) -> None:
    (tmp_path / "first").write_bytes(packed)
    for _ in range(3):
        write_packed(mixed(), tmp_path / "second")
        assert (tmp_path / "second").read_bytes() == packed
        write_packed(read_packed(tmp_path / "first"), tmp_path / "first")
        assert (tmp_path / "first").read_bytes() == packed


floats = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1, 1, width=16) | st.just(0.0)


@pytest.mark.robustness
@settings(max_examples=40, deadline=None)
@given(values=st.lists(floats, min_size=16, max_size=16), vector=st.lists(floats, min_size=8, max_size=8))
def test_any_values_are_restored_as_stored_and_stay(
    values: list[float], vector: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    changed = {DENSE: torch.tensor(values).view(2, 8), VARIANCE: torch.tensor(vector)}
    after, _ = restored(tiny(changed), folder)
    for name, tensor in changed.items():
        assert torch.equal(after.state_dict[name], stored_values(tensor))
        assert ((after.state_dict[name] - tensor).abs() <= (tensor.abs() * 2**-11).clamp(min=2**-25)).all()
        assert torch.equal(stored_values(after.state_dict[name]), after.state_dict[name])
    first = (folder / "packed.safetensors").read_bytes()
    restored(after, folder)
    assert (folder / "packed.safetensors").read_bytes() == first


@settings(max_examples=30, deadline=None)
@given(
    symbols=npst.arrays(np.int8, 64, elements=st.integers(-1, 1)),
    w_p=st.floats(0, 2.0**100, width=32, exclude_min=True),
    w_n=st.floats(0, 2.0**100, width=32, exclude_min=True),
)
def test_any_ternary_layer_is_restored_bit_for_bit(
    symbols: np.ndarray, w_p: float, w_n: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = "layer2.0.shortcut.0.weight"
    values = np.where(symbols > 0, np.float32(w_p), np.where(symbols < 0, -np.float32(w_n), np.float32(0)))
    weight = torch.from_numpy(values).view(8, 8, 1, 1)
    after, report = restored(tiny({name: weight}), tmp_path_factory.mktemp("ternary"))
    assert same_bytes(after.state_dict[name], weight)
    assert layer_of(report, name).kind == Kind.TERNARY
    assert layer_of(report, name).bytes <= 13  # five a byte; two masks are 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_checkpoints_of_other_precision_are_restored_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in reference_tensors("tiny").items()}
    after, _ = restored(tiny(tensors), tmp_path)
    for name, tensor in after.state_dict.items():
        assert same_bytes(tensor, stored_values(tensors[name].float()))


def test_the_memory_layout_does_not_matter(tmp_path: Path) -> None:
    convolutions = {name: tensor for name, tensor in mixed().state_dict.items() if tensor.ndim == 4}
    other = {name: t.contiguous(memory_format=torch.channels_last) for name, t in convolutions.items()}
    assert not other[TERNARY].is_contiguous()
    first, _ = restored(mixed(), tmp_path)
    second, _ = restored(Checkpoint(Path("x"), TINY, mixed().state_dict | other, EXTRA), tmp_path)
    assert all(same_bytes(tensor, second.state_dict[name]) for name, tensor in first.state_dict.items())


def test_zeros_lose_their_sign_in_ternary_and_sparse_layers(tmp_path: Path) -> None:
    ternary = reference_tensors("tiny")[TERNARY] * -1.0
    sparse = torch.tensor([-0.0, 1.0, 2.0, 3.0] * 4).view(2, 8)
    assert (ternary.signbit() & (ternary == 0)).any()
    after, report = restored(tiny({TERNARY: ternary, DENSE: sparse}), tmp_path)
    assert (layer_of(report, TERNARY).kind, layer_of(report, DENSE).kind) == (Kind.TERNARY, Kind.SPARSE)
    for name, tensor in ((TERNARY, ternary), (DENSE, sparse)):
        assert torch.equal(after.state_dict[name], tensor)
        assert not after.state_dict[name][tensor == 0].signbit().any()


# -------------------------------------------------------------------------------------- kinds, sizes, report


def dense(*values: float) -> Tensor:
    """A weight [2, 8] with sixteen values, the last ones those given."""
    return torch.cat([torch.arange(1.0, 17.0 - len(values)), torch.tensor(values)]).view(2, 8)


@pytest.mark.parametrize(
    ("name", "tensor", "kind", "size"),
    [
        (DENSE, dense(), Kind.HALF, 32),
        (DENSE, dense(0.0), Kind.HALF, 32),
        (DENSE, dense(0.0, 0.0), Kind.SPARSE, 2 + 2 * 14),  # the mask takes 2 bytes
        (DENSE, dense(65504.0), Kind.HALF, 32),
        (DENSE, dense(65505.0), Kind.FLOAT, 64),
        (DENSE, dense(1e-30), Kind.HALF, 32),
        (DENSE, 2**-18 * dense(), Kind.HALF, 32),
        (DENSE, 2**-20 * (dense() + 1 / 3), Kind.FLOAT, 64),
        (DENSE, torch.zeros(2, 8), Kind.TERNARY, 2),
        (DENSE, torch.full((2, 8), 7.0), Kind.TERNARY, 4),
        (DENSE, 1 + 1e-6 * dense(), Kind.TERNARY, 4),  # rounding makes it so
        (VARIANCE, torch.ones(8), Kind.HALF, 16),
        (VARIANCE, torch.zeros(8), Kind.SPARSE, 1),
        (VARIANCE, torch.full((8,), 1e5), Kind.FLOAT, 32),
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
    streams = safetensors.numpy.load(packed)
    by_kind = {kind: [layer for layer in report.layers if layer.kind == kind] for kind in Kind}
    nonzero = [int(source.state_dict[layer.name].count_nonzero()) for layer in by_kind[Kind.SPARSE]]
    halves = sum(layer.weights for layer in by_kind[Kind.HALF]) + sum(nonzero)
    high = streams.pop("high").size
    assert {key: stream.nbytes for key, stream in streams.items()} == {
        "kinds": len(report.layers),
        "low": halves,
        "masks": sum(-(-layer.weights // 8) for layer in by_kind[Kind.SPARSE]),
        "float": 4 * 8,
        "coders": len(report.ternary),
        "sizes": 4 * len(report.ternary),
        "centroids": 8 * len(report.ternary),
        "symbols": report.ternary_bytes,
    }
    header = 8 + int.from_bytes(packed[:8], "little")
    assert len(packed) == header + high + sum(stream.nbytes for stream in streams.values())
    assert report.file_bytes == len(packed) == report.path.stat().st_size
    assert high < halves and header < 1200


def test_the_report_says_what_the_same_values_take_otherwise(tmp_path: Path) -> None:
    weight = torch.tensor([0.0, 0.0, 0.5, -0.25] * 16).view(8, 8, 1, 1)
    name = "layer2.0.shortcut.0.weight"
    _, report = restored(tiny({name: weight}), tmp_path)
    assert layer_of(report, name).entropy_bytes == 64 * 1.5 / 8
    floats = [tensor for tensor in reference_tensors("tiny").values() if tensor.is_floating_point()]
    assert report.float32_bytes == 4 * sum(tensor.numel() for tensor in floats)
    assert report.entropy_bytes == pytest.approx(sum(layer.entropy_bytes for layer in report.ternary))


def test_a_ternary_resnet20_takes_less_than_its_symbols_entropy_and_16_bit_a_value(tmp_path: Path) -> None:
    tensors = reference_tensors("resnet20")
    _, report = restored(Checkpoint(Path("x"), {"name": "resnet20", "num_classes": 10}, tensors), tmp_path)
    rest = 2 * sum(layer.weights for layer in report.layers if layer.kind != Kind.TERNARY)
    assert len(report.ternary) == 18
    assert report.ternary_bytes < 1.005 * report.entropy_bytes
    assert report.file_bytes < report.ternary_bytes + rest


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
