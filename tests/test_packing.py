"""The packed file: exact round trips, exact sizes, and bad input of every kind refused in one line."""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import math
import os
import random
import re
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from reference.make_checkpoint import make_state_dict
from torch import Tensor

from engine import UserError, checkpoint, coding, packing
from engine.checkpoint import Checkpoint, network_content, read_network
from engine.packing import ENTRY, Kind, PackReport, is_packed, read_packed, stored_values, write_packed
from model import EFFICIENTNETS, build

TINY = {"name": "cifar_micronet", "depth": 0.1, "width": 0.1, "num_classes": 2}  # 8 channels, 3 blocks
MICRONET = {"name": "cifar_micronet", "depth": 1.4**3.5, "width": 1.2**3.5, "num_classes": 100}  # 8.1M values
EXTRA = {"dataset": "CIFAR10", "image_size": 32, "accuracy": 91.01}
TERNARY, DENSE, VARIANCE = "layer1.0.conv1.weight", "linear.weight", "bn1.running_var"  # tensors of TINY

quick = settings(max_examples=100, deadline=None)
symbol_arrays = npst.arrays(np.uint8, st.integers(0, 300), elements=st.integers(0, 2))


@functools.cache
def reference_tensors(name: str) -> dict[str, Tensor]:
    """The tensors of a reference checkpoint; shared, so not to be changed."""
    network = build(TINY if name == "tiny" else {"name": name})
    return make_state_dict(network, "efficientnet" if name in EFFICIENTNETS else "micronet", salt=1)


def tiny(changed: dict[str, Tensor] | None = None, extra: dict | None = None) -> Checkpoint:
    tensors = reference_tensors("tiny") | (changed or {})
    return Checkpoint(Path("tiny.pt"), dict(TINY), tensors, extra or EXTRA)


def mixed() -> Checkpoint:
    """A small network with tensors of every kind."""
    sparse = reference_tensors("tiny")["conv1.weight"].clone()
    sparse[::2] = 0
    return tiny({"conv1.weight": sparse, VARIANCE: torch.linspace(1, 1e6, 8)})


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of `mixed`."""
    path = tmp_path_factory.mktemp("packed") / "mixed.safetensors"
    report = write_packed(mixed(), path)
    assert {layer.kind for layer in report.layers} == set(Kind)
    return path.read_bytes()


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


# ------------------------------------------------------------------------------------------ symbols a byte


def drawn_symbols(seed: int, size: int, zeros: float) -> np.ndarray:
    shares = [zeros, (1 - zeros) / 2, (1 - zeros) / 2]
    return np.random.default_rng(seed).choice(3, size, p=shares).astype(np.uint8)


def test_pack_writes_base_3_numbers_and_fills_up_with_zeros() -> None:
    assert coding.pack(np.array([1, 2, 0, 1, 2], np.uint8), 3).tolist() == [1 * 9 + 2 * 3 + 0, 1 * 9 + 2 * 3]
    assert coding.pack(np.array([2, 2, 2, 2, 2], np.uint8), 5).tolist() == [242]
    assert coding.pack(np.empty(0, np.uint8), 5).tolist() == []


@pytest.mark.parametrize(
    ("symbols", "numbers"),
    [
        ([], []),
        ([0, 0], []),
        ([1, 2, 0, 0, 1, 0], [2 * 0 + 0, 2 * 0 + 1, 2 * 2 + 0]),
        ([0] * 126 + [2], [2 * 126 + 1]),
        ([0] * 127 + [1], [254, 0]),
        ([0] * 300 + [2, 1], [254, 254, 2 * 46 + 1, 0]),
    ],
)
def test_pack_writes_gaps(symbols: list[int], numbers: list[int]) -> None:
    packed = coding.pack(np.array(symbols, np.uint8), coding.GAPS)
    assert packed.dtype == np.uint8 and packed.tolist() == numbers
    assert coding.unpack(packed, coding.GAPS, len(symbols)).tolist() == symbols


@quick
@given(symbols=symbol_arrays, digits=st.integers(1, 5))
def test_unpack_restores_symbols(symbols: np.ndarray, digits: int) -> None:
    numbers = coding.pack(symbols, digits)
    assert numbers.dtype == np.uint8 and numbers.size == -(-symbols.size // digits)
    assert np.array_equal(coding.unpack(numbers, digits, symbols.size), symbols)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), zeros=st.floats(0.9, 1), size=st.integers(0, 2000))
def test_unpack_restores_gaps(seed: int, zeros: float, size: int) -> None:
    symbols = drawn_symbols(seed, size, zeros)
    assert np.array_equal(coding.unpack(coding.pack(symbols, coding.GAPS), coding.GAPS, size), symbols)


@pytest.mark.parametrize(
    ("numbers", "digits", "size"),
    [
        ([242], 5, 6),
        ([242, 0], 5, 5),
        ([243], 5, 5),
        ([255], 5, 5),
        ([1], 5, 4),
        ([27], 3, 3),
        ([], 5, 1),
        ([0], 5, 0),
        ([255], coding.GAPS, 200),
        ([4], coding.GAPS, 2),
        ([254], coding.GAPS, 126),
        ([0, 0, 0], coding.GAPS, 2),
        ([0], coding.GAPS, 0),
    ],
)
def test_unpack_refuses_what_is_not_so_many_symbols(numbers: list[int], digits: int, size: int) -> None:
    with pytest.raises(ValueError, match="symbols"):
        coding.unpack(np.array(numbers, np.uint8), digits, size)


# ---------------------------------------------------------------------------------------- codes of symbols


@quick
@given(symbols=symbol_arrays)
def test_any_symbols_are_restored_and_never_take_more_than_two_masks(symbols: np.ndarray) -> None:
    position, code = coding.encode_symbols(symbols)
    assert np.array_equal(coding.decode_symbols(position, code, symbols.size), symbols)
    assert len(code) <= -(-symbols.size // 5) <= -(-2 * symbols.size // 8)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    zeros=st.floats(0, 1),
    size=st.integers(1, 20_000),
    repeats=st.integers(1, 3),
)
def test_drawn_symbols_are_restored(seed: int, zeros: float, size: int, repeats: int) -> None:
    symbols = np.tile(drawn_symbols(seed, size, zeros), repeats)
    position, code = coding.encode_symbols(symbols)
    assert np.array_equal(coding.decode_symbols(position, code, symbols.size), symbols)
    assert len(code) <= -(-symbols.size // 5)


@pytest.mark.parametrize("zeros", [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98])
def test_independent_symbols_take_about_their_entropy(zeros: float) -> None:
    symbols = drawn_symbols(0, 100_000, zeros)
    assert len(coding.encode_symbols(symbols)[1]) < 1.04 * coding.entropy_bytes(symbols)


def test_rows_that_resemble_each_other_take_less_than_the_entropy_of_their_symbols() -> None:
    rows = np.repeat(drawn_symbols(0, 10_000, 0.6), 3)
    position, code = coding.encode_symbols(rows)
    assert coding.CODERS[position] == coding.Coder(3, coding.DEFLATE)
    assert len(code) < 0.4 * coding.entropy_bytes(rows)


@pytest.mark.parametrize(
    ("symbols", "coder"),
    [
        (drawn_symbols(0, 5_000, 1 / 3), "5 a byte, raw"),
        (drawn_symbols(0, 5_000, 0.8), "3 a byte, deflate"),
        (drawn_symbols(0, 100_000, 0.65), "5 a byte, deflate"),
        (drawn_symbols(0, 50_000, 0.95), "gaps, deflate"),
        (np.tile(drawn_symbols(0, 5_000, 0.7), 10), "5 a byte, LZMA"),
    ],
    ids=["uniform", "a small layer", "a large layer", "a sparse layer", "repeated"],
)
def test_every_coder_is_the_best_for_some_layer(symbols: np.ndarray, coder: str) -> None:
    position, code = coding.encode_symbols(symbols)
    assert str(coding.CODERS[position]) == coder
    for digits, compressor in coding.CODERS:
        assert len(coding.compress(compressor, coding.pack(symbols, digits).tobytes())) >= len(code)


@pytest.mark.parametrize("coder", coding.CODERS, ids=str)
@pytest.mark.parametrize(
    "damage",
    [
        lambda code, size: (code, size - 5),
        lambda code, size: (code, size + 5),
        lambda code, size: (code + b"\0", size),
        lambda code, size: (code[:-1], size),
        lambda code, size: (b"\xff" * len(code), size),
        lambda code, size: (b"", size),
    ],
    ids=["longer", "shorter", "trailing", "truncated", "garbage", "empty"],
)
def test_no_coder_accepts_other_symbols_than_so_many(coder: coding.Coder, damage: Callable) -> None:
    symbols, position = np.full(999, 2, np.uint8), coding.CODERS.index(coder)
    code = coding.compress(coder.compressor, coding.pack(symbols, coder.digits).tobytes())
    assert np.array_equal(coding.decode_symbols(position, code, 999), symbols)
    code, size = damage(code, 999)
    if coder.digits == coding.GAPS and size > 999:  # gaps do not say how many zeros follow the last weight
        assert coding.decode_symbols(position, code, size).tolist() == [*symbols.tolist(), *[0] * 5]
    else:
        with pytest.raises(ValueError):
            coding.decode_symbols(position, code, size)


def test_an_unknown_coder_is_refused() -> None:
    with pytest.raises(ValueError, match="coder 5"):
        coding.decode_symbols(5, b"\0", 5)


@pytest.mark.parametrize("compressor", [coding.DEFLATE, coding.LZMA])
def test_a_decompression_bomb_makes_no_more_than_what_is_asked_for(compressor: str) -> None:
    bomb = coding.compress(compressor, bytes(50_000_000))
    assert len(bomb) < 100_000
    with allocating_less_than(4_000_000), pytest.raises(ValueError, match="within 1000 bytes"):
        coding.decompress(compressor, bomb, 1000)


@pytest.mark.parametrize("compressor", [coding.DEFLATE, coding.LZMA])
def test_decompress_makes_as_much_as_the_limit_and_no_more(compressor: str) -> None:
    code = coding.compress(compressor, b"symbol" * 9)
    assert coding.decompress(compressor, code, 54).tobytes() == b"symbol" * 9
    with pytest.raises(ValueError, match="within 53 bytes"):
        coding.decompress(compressor, code, 53)


def test_entropy_of_symbols() -> None:
    assert coding.entropy_bytes(np.array([0, 0, 1, 2] * 16, np.uint8)) == 64 * 1.5 / 8
    assert coding.entropy_bytes(np.zeros(64, np.uint8)) == 0


# ------------------------------------------------------------------------------------------ 16-bit numbers


@quick
@given(bits=npst.arrays(np.uint16, st.integers(0, 300)))
def test_halves_are_restored_bit_for_bit(bits: np.ndarray) -> None:
    high, low = coding.encode_halves(bits.view(np.float16))
    restored = coding.decode_halves(high, low)
    assert restored.dtype == np.float16 and np.array_equal(restored.view(np.uint16), bits)


def test_halves_of_weights_take_15_percent_less() -> None:
    values = np.random.default_rng(0).standard_normal(20_000).astype(np.float16)
    high, low = coding.encode_halves(values)
    assert low.size == values.size and len(high) + low.size < 0.85 * values.nbytes


def test_halves_need_as_many_high_bytes_as_low_ones() -> None:
    high, low = coding.encode_halves(np.arange(9, dtype=np.float16))
    with pytest.raises(ValueError, match="within 8 bytes"):
        coding.decode_halves(high, low[:-1])
    with pytest.raises(ValueError, match="9 high bytes for 10 low ones"):
        coding.decode_halves(high, np.append(low, low[:1]))


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", ["tiny", "resnet20", "efficientnet-b1"])
def test_networks_are_restored(name: str, tmp_path: Path) -> None:
    spec = TINY if name == "tiny" else {"name": name, "num_classes": 1000 if name in EFFICIENTNETS else 10}
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


# ----------------------------------------------------------------------------------------------- bad input


def refused(data: bytes, folder: Path, match: str = "damaged") -> None:
    """`data` is refused: in one line, and with no more memory than a network without its tensors takes."""
    path = folder / "bad"
    path.write_bytes(data)
    with allocating_less_than(24_000_000), pytest.raises(UserError, match=match) as caught:
        read_packed(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < len(str(path)) + 300


def sealed(data: bytes) -> bytes:
    """`data` with the digest it should have, if it has any: what a forger would do."""
    found = re.search(rb'sha256\\":\\"([0-9a-f]{64})\\"', data)
    if not found:
        return data
    blank = data.replace(found[1], b"0" * 64, 1)
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


def header_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def forged(data: bytes, content: dict | None = None, streams: dict | None = None) -> bytes:
    """The packed file `data` with content or streams replaced (None: left out), and the digest of that."""
    old = json.loads(json.loads(header_of(data))["__metadata__"][ENTRY])
    arrays = safetensors.numpy.load(data) | (streams or {})
    arrays = {key: array for key, array in arrays.items() if array is not None}
    metadata = {ENTRY: json.dumps(old | (content or {}), separators=(",", ":"))}
    return sealed(safetensors.numpy.save(arrays, metadata))


def with_header(data: bytes, header: bytes) -> bytes:
    """The packed file `data` with another header."""
    return len(header).to_bytes(8, "little") + header + data[8 + len(header_of(data)) :]


def test_a_forger_who_changes_nothing_is_believed(packed: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(forged(packed))
    for name, tensor in read_packed(tmp_path / "a").state_dict.items():
        assert torch.equal(tensor, stored_values(mixed().state_dict[name]))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"{path}: can't be read .{reason}"):
            read_packed(path)


def test_files_too_large_are_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**40)
    with allocating_less_than(1_000_000), pytest.raises(UserError, match="too large"):
        read_packed(tmp_path / "large")


def test_truncated_and_lengthened_files_are_refused(packed: bytes, tmp_path: Path) -> None:
    for length in [*range(0, 20), *range(20, len(packed), 97), len(packed) - 1]:
        refused(packed[:length], tmp_path, "damaged")
    for data in (packed + b"\0", packed + packed, packed[:2000] + packed):
        refused(data, tmp_path, "checksum")
        refused(sealed(data), tmp_path, "damaged, or made up")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"{" * 1000,
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"\xff\xfe\x00",
        b"\x80abc",
        b'{"__metadata__":3}',
        b'{"__metadata__":{"ec2t-packed":3}}',
        b'{"__metadata__":{"ec2t-packed":"3"}}',
        b'{"__metadata__":{"ec2t-packed":"{}"}}',
        b'{"__metadata__":{"ec2t-packed":"[1]"}}',
        b'{"__metadata__":{"ec2t-packed":"' + b"[" * 60_000 + b'"}}',
        b'{"__metadata__":{"ec2t-packed":"' + b"9" * 60_000 + b'"}}',
        b'{"__metadata__":{"other":"{}"}}',
    ],
)
def test_absurd_headers_are_refused(header: bytes, packed: bytes, tmp_path: Path) -> None:
    refused(with_header(packed, header), tmp_path, "no packed network")


@pytest.mark.parametrize("length", [0, 1, 2**16, 2**31, 2**63, 2**64 - 1])
def test_absurd_header_lengths_are_refused(length: int, packed: bytes, tmp_path: Path) -> None:
    refused(length.to_bytes(8, "little") + packed[8:], tmp_path)
    refused(sealed(length.to_bytes(8, "little") + packed[8:]), tmp_path)


def test_a_large_header_is_not_parsed(packed: bytes, tmp_path: Path) -> None:
    header = b'{"x":[' + b"0," * 3_000_000 + b"0]," + header_of(packed)[1:]
    refused(sealed(with_header(packed, header)), tmp_path, "no packed network")


@pytest.mark.parametrize("content", [b"", b"text\n" * 100, bytes(1000), b"PK\3\4" + bytes(1000)])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    refused(content, tmp_path, "no packed network")
    refused(safetensors.numpy.save({"weight": np.zeros(9)}), tmp_path, "no packed network")


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], 1.5, "\n" * 9, "9" * 9999])
def test_other_versions_are_refused(version: object, packed: bytes, tmp_path: Path) -> None:
    refused(forged(packed, {"version": version}), tmp_path, "not 1; pack")


@pytest.mark.parametrize("digest", ["", "0" * 63, "1" * 64, "F" * 64, 10**63, None, ["0" * 64], "\n" * 64])
def test_other_digests_are_refused(digest: object, packed: bytes, tmp_path: Path) -> None:
    unsealed = forged(packed, {"sha256": "none"})
    refused(unsealed.replace(b'\\"none\\"', json.dumps(json.dumps(digest))[1:-1].encode()), tmp_path)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"name": None},
        {"name": ["resnet20"]},
        {"name": "no\nname" * 1000},
        {"name": "resnet20"},
        {"name": "cifar_micronet", "num_classes": 2},
        {"name": "resnet20", "num_classes": 10, "depth": 2},
        {"name": "resnet20", "num_classes": 2.5},
        TINY | {"more": 1},
        *(TINY | {"depth": value} for value in (0, -1, 33, 1e9, 10**400, math.nan, math.inf, True, "1")),
        *(TINY | {"width": value} for value in (0, -1.5, 1e300, {}, None, -math.inf)),
        *(TINY | {"num_classes": value} for value in (0, -1, 2**62, 10**30, 0.5, "2", False)),
        {"name": "efficientnet-b4", "num_classes": 2**20},
        {"name": "imagenet_micronet", "depth": 4, "width": 32, "num_classes": 1000},
    ],
    ids=lambda spec: repr(spec)[:60],
)
def test_specs_that_make_no_sensible_network_are_refused(spec: dict, packed: bytes, tmp_path: Path) -> None:
    refused(forged(packed, {"spec": spec}), tmp_path, "describes no network|can't be built|has more than")


@pytest.mark.parametrize(
    "content", [{"spec": None}, {"spec": [1]}, {"spec": "tiny"}, {"extra": None}, {"extra": [1]}], ids=repr
)
def test_a_file_must_say_its_network(content: dict, packed: bytes, tmp_path: Path) -> None:
    refused(forged(packed, content), tmp_path, "does not say")


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "resnet20", "num_classes": 10},
        TINY | {"num_classes": 3},
        TINY | {"num_classes": 1},
        TINY | {"depth": 0.2},
        TINY | {"width": 1.0},
        TINY | {"name": "imagenet_micronet"},
        TINY | {"depth": 1.0, "width": 5.0},
        TINY | {"num_classes": 2**20},
    ],
    ids=repr,
)
def test_a_file_is_not_read_as_another_network(spec: dict, packed: bytes, tmp_path: Path) -> None:
    refused(forged(packed, {"spec": spec}), tmp_path, "damaged, or made up")


def test_hostile_extra_entries_are_dropped(packed: bytes, tmp_path: Path) -> None:
    extra = {"dataset": ["digits"], "image_size": 1e9, "accuracy": [1], "state_dict": {}, "x": "x" * 1000}
    (tmp_path / "a").write_bytes(forged(packed, {"extra": extra}))
    assert read_packed(tmp_path / "a").extra == {}


def changed(key: str, change: Callable[[np.ndarray], object]) -> Callable[[bytes], bytes]:
    """A forger who changes one stream."""
    return lambda data: forged(data, streams={key: change(safetensors.numpy.load(data)[key])})


def replaced(index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def replace(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = value
        return array

    return replace


def deflated(data: bytes) -> np.ndarray:
    return np.frombuffer(coding.compress(coding.DEFLATE, data), np.uint8)


def ternary_of(code: bytes, position: int) -> Callable[[bytes], bytes]:
    """A forger who replaces the code of the first ternary layer, 576 weights."""

    def forge(data: bytes) -> bytes:
        streams = safetensors.numpy.load(data)
        symbols = np.concatenate([np.frombuffer(code, np.uint8), streams["symbols"][streams["sizes"][0] :]])
        sizes, coders = replaced(0, len(code))(streams["sizes"]), replaced(0, position)(streams["coders"])
        return forged(data, streams={"symbols": symbols, "sizes": sizes, "coders": coders})

    return forge


CHANGES = {
    "missing": lambda array: None,
    "one short": lambda array: array[:-1],
    "one more": lambda array: np.append(array, array[-1:]),
    "empty": lambda array: array[:0],
    "as float64": lambda array: array.astype(np.float64),
}
BOMB = bytes(20_000_000)
FORGERIES = {
    **{f"{key} {how}": changed(key, change) for key in packing.CONTAINER for how, change in CHANGES.items()},
    "one tensor more": lambda data: forged(data, streams={"more": np.zeros(1, np.uint8)}),
    "a kind that is none": changed("kinds", replaced(-1, 4)),
    "a coder that is none": changed("coders", replaced(0, 5)),
    "kinds in another order": changed("kinds", lambda array: array[::-1].copy()),
    "a size beyond the file": changed("sizes", replaced(0, 2**32 - 1)),
    "a size of zero": changed("sizes", replaced(0, 0)),
    "an infinite centroid": changed("centroids", replaced(0, np.inf)),
    "a centroid that is NaN": changed("centroids", replaced(1, np.nan)),
    "an infinite float": changed("float", replaced(0, -np.inf)),
    "a mask with more ones": changed("masks", replaced(0, 255)),
    "a mask with fewer ones": changed("masks", replaced(-1, 0)),
    "infinite float16 values": changed("high", lambda array: deflated(b"\x7c" * array.size)),
    "high bytes that are a bomb": changed("high", lambda array: deflated(BOMB)),
    "high bytes that are none": changed("high", lambda array: np.full(array.size, 255, np.uint8)),
    "symbols that are too many": ternary_of(bytes(117), 0),
    "symbols that are too few": ternary_of(bytes(115), 0),
    "symbols that are none": ternary_of(b"\xf3" * 116, 0),
    "symbols behind the last": ternary_of(b"\1" * 116, 0),
    "symbols in deflate that are too many": ternary_of(deflated(bytes(193)).tobytes(), 3),
    "symbols in deflate that are too few": ternary_of(deflated(bytes(191)).tobytes(), 3),
    "symbols in deflate and more": ternary_of(deflated(bytes(192)).tobytes() + b"\0", 3),
    "gaps beyond the last symbol": ternary_of(deflated(bytes([254] * 5)).tobytes(), 4),
    "gaps that are none": ternary_of(deflated(b"\xff").tobytes(), 4),
    "symbols that are a bomb in deflate": ternary_of(deflated(BOMB).tobytes(), 4),
    "symbols that are a bomb in LZMA": ternary_of(coding.compress(coding.LZMA, BOMB), 1),
    "symbols with zlib's header": ternary_of(zlib.compress(bytes(192)), 3),
    "symbols with xz's header": ternary_of(lzma.compress(bytes(116)), 1),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_forged_streams_are_refused(forge: Callable[[bytes], bytes], packed: bytes, tmp_path: Path) -> None:
    data = forge(packed)
    assert data != packed
    refused(data, tmp_path, "damaged, or made up|NaN or infinite")


def test_the_reason_of_a_refusal_is_said(packed: bytes, tmp_path: Path) -> None:
    refused(changed("kinds", replaced(0, 4))(packed), tmp_path, "no kind 4 of tensor")
    refused(changed("coders", replaced(0, 5))(packed), tmp_path, "no coder 5")
    refused(changed("float", lambda array: array[1:])(packed), tmp_path, "float end too early")
    refused(changed("sizes", lambda array: np.append(array, array))(packed), tmp_path, "6 sizes too many")


def test_a_forger_whose_symbols_fit_is_believed(packed: bytes, tmp_path: Path) -> None:
    for position, code in ((0, bytes(116)), (3, deflated(bytes(192))), (4, deflated(b""))):
        (tmp_path / "a").write_bytes(ternary_of(bytes(code), position)(packed))
        assert not read_packed(tmp_path / "a").state_dict[TERNARY].any()


@pytest.mark.parametrize(
    "entry",
    [
        b'"kinds":{"dtype":"U8","shape":[281474976710656],"data_offsets":[0,281474976710656]}',
        b'"kinds":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}',
        b'"kinds":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}',
        b'"kinds":{"dtype":"U8","shape":[0],"data_offsets":[5,0]}',
        b'"kinds":{"dtype":"X9","shape":[0],"data_offsets":[0,0]}',
        b'"kinds":{"dtype":"F8_E4M3","shape":[0],"data_offsets":[0,0]}',
        b'"kinds":{}',
        b'"kinds":[]',
    ],
)
def test_absurd_declarations_are_refused(entry: bytes, packed: bytes, tmp_path: Path) -> None:
    header = header_of(packed)
    declared = re.search(rb'"kinds":\{[^}]*\}', header)[0]
    refused(sealed(with_header(packed, header.replace(declared, entry))), tmp_path, "damaged, or made up")
    both = declared + b"," + entry
    refused(sealed(with_header(packed, header.replace(declared, both))), tmp_path, "damaged, or made up")


@pytest.mark.parametrize("dtype", [b"I8", b"BOOL", b"F8_E4M3", b"F8_E8M0", b"F4", b"U64"])
def test_other_types_of_tensors_are_refused(dtype: bytes, packed: bytes, tmp_path: Path) -> None:
    header = header_of(packed).replace(b'"U8"', b'"%s"' % dtype)
    refused(sealed(with_header(packed, header)), tmp_path, "damaged, or made up")


def test_a_tensor_declared_twice_is_refused(packed: bytes, tmp_path: Path) -> None:
    header = header_of(packed)
    kinds, masks = (re.search(rb'"%s":\{[^}]*\}' % key, header)[0] for key in (b"kinds", b"masks"))
    twice = kinds + b"," + masks.replace(b"masks", b"kinds")
    refused(sealed(with_header(packed, header.replace(kinds, twice))), tmp_path, "made up")


# ------------------------------------------------------------------------------------------------- fuzzing


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to three random changes, half of them in the header."""
    damaged = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(header if rng.random() < 0.5 else len(damaged), len(damaged)) or 1)
        end = at + rng.randint(1, 40)
        change = rng.randrange(6)
        if change == 0:
            damaged[at : at + 1] = bytes([rng.randrange(256)])
        elif change == 1:
            damaged[at : at + 1] = bytes([(*damaged, 0)[at] ^ 1 << rng.randrange(8)])
        elif change == 2:
            del damaged[at:end]
        elif change == 3:
            damaged[at:at] = damaged[at:end]
        elif change == 4:
            del damaged[at:]
        else:  # a digit in the header for another
            digits = [i for i, byte in enumerate(damaged[:header]) if chr(byte).isdigit()] or [0]
            damaged[rng.choice(digits)] = ord(rng.choice("0123456789"))
    return bytes(damaged)


def test_no_mutation_is_accepted(packed: bytes, tmp_path: Path) -> None:
    rng, path, refusals = random.Random(0), tmp_path / "fuzz", 0
    for _ in range(400):
        damaged = mutated(packed, rng)
        path.write_bytes(damaged)
        if damaged != packed:
            with pytest.raises(UserError):
                read_packed(path)
            refusals += 1
    assert refusals > 350


def test_sealed_mutations_are_refused_or_make_the_network_they_claim(packed: bytes, tmp_path: Path) -> None:
    rng, path, accepted = random.Random(1), tmp_path / "fuzz", 0
    for _ in range(400):
        path.write_bytes(sealed(mutated(packed, rng)))
        try:
            after = read_packed(path)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        accepted += 1
        with torch.device("meta"):
            expected = build(after.spec).state_dict()
        shapes = {name: tensor.shape for name, tensor in expected.items() if tensor.is_floating_point()}
        assert {name: tensor.shape for name, tensor in after.state_dict.items()} == shapes
        assert all(torch.isfinite(tensor).all() for tensor in after.state_dict.values())
    assert accepted > 10
