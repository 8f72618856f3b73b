"""The packed file: exact round trips; sizes are in test_packing_sizes.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor, nn

from engine.evaluation import as_stored
from engine.store.checkpoint import Checkpoint
from engine.store.values import stored_values
from helpers.packed_files import (
    BOOK,
    DENSE,
    EXTRA,
    OWN,
    REPEATED,
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
from model.levels import grid, is_quantized, levels_of
from model_scoring.packing import Kind, read_packed, write_packed


@pytest.mark.parametrize("name", ["tiny", "resnet20", "efficientnet-b1"])
def test_networks_are_restored(name: str, tmp_path: Path) -> None:
    spec = TINY if name == "tiny" else {"name": name, "num_classes": 1000 if name.startswith("efficientnet-b") else 10}
    tensors = reference_tensors(name)
    after, report = restored(Checkpoint(Path("x.pt"), spec, tensors, EXTRA | {"centroids": [1.0]}), tmp_path)
    assert after.spec == spec and after.extra == EXTRA and after.path == tmp_path / "packed.safetensors"
    assert list(after.state_dict) == [key for key in tensors if not key.endswith("num_batches_tracked")]
    for key, tensor in after.state_dict.items():
        assert same_bytes(tensor, stored_values(tensors[key]))
    assert sum(same_bytes(after.state_dict[layer.name], tensors[layer.name]) for layer in report.quantized) >= 6
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
@settings(max_examples=20, deadline=None)
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


@settings(max_examples=20, deadline=None)
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
    assert layer_of(report, name).kind in (Kind.GRID, Kind.SPARSE)
    assert layer_of(report, name).bytes <= 13  # five a byte; two masks are 16


@settings(max_examples=60, deadline=None)
@given(
    multiples=npst.arrays(np.int8, 64, elements=st.integers(-127, 127)),
    bits=st.integers(2, 8),
    steps=st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=2, max_size=2),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_any_grid_of_2_to_8_bits_is_recognised_and_restored_bit_for_bit(
    multiples: np.ndarray, bits: int, steps: list[float], dtype: type, tmp_path_factory: pytest.TempPathFactory
) -> None:
    multiples = np.rint(multiples / 127 * (2 ** (bits - 1) - 1)).astype(dtype)
    values = multiples * np.where(multiples > 0, *np.array(steps, dtype)[:, None])
    found = levels_of(values)
    assert found and found.steps is not None and found.values.size <= 2**bits - 1
    assert np.array_equal(found.values[found.symbols], values)
    weight = torch.from_numpy(values).view(8, 8)
    assert is_quantized(weight) and stored_values(weight) is weight
    after, _ = restored(Checkpoint(Path("x"), OWN, {"w": weight}), tmp_path_factory.mktemp("grid"))
    assert same_bytes(after.state_dict["w"], weight + 0.0)


def test_levels_of_a_grid_alternate_and_grow() -> None:
    assert grid(np.array([0.5, 2.0]), 3).tolist() == [0, 0.5, -2, 1, -4, 1.5, -6]
    codebook = levels_of(np.array([3.7, -1.0, 0.0, 0.3, 9.1, -1.0, 9.1]))
    assert codebook and codebook.steps is None and codebook.values.tolist() == [0, 0.3, -1, 3.7, 9.1]
    assert codebook.symbols.tolist() == [3, 2, 0, 1, 4, 2, 4]
    assert levels_of(np.arange(257.0)) is None and levels_of(np.array([0.0, np.nan])) is None
    assert levels_of(np.empty(0)) is None and levels_of(np.array([1j])) is None


@pytest.mark.parametrize("half_precision", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_checkpoints_of_other_precision_are_restored_in_it(
    dtype: torch.dtype, half_precision: bool, tmp_path: Path
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in reference_tensors("tiny").items()}
    write_packed(tiny(tensors), tmp_path / "a", half_precision)
    for name, tensor in read_packed(tmp_path / "a").state_dict.items():
        kept = stored_values(tensors[name], half_precision)
        assert tensor.dtype == dtype and torch.equal(tensor, kept)
        assert torch.equal(kept, tensors[name]) or (half_precision and dtype == torch.float64)


def test_without_half_precision_all_values_keep_their_bits(tmp_path: Path) -> None:
    report = write_packed(mixed(), tmp_path / "a", half_precision=False)
    for name, tensor in read_packed(tmp_path / "a").state_dict.items():
        assert torch.equal(tensor, mixed().state_dict[name])
    assert report.file_bytes > 1.5 * write_packed(mixed(), tmp_path / "a").file_bytes


class Own(nn.Module):
    """A network with whatever a state dict may hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(24, 16)
        self.norm = nn.BatchNorm1d(16)
        self.precise = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        mask = torch.full((9, 9), -torch.inf).triu(1)
        buffers = {
            "mask": mask,
            "nan": torch.tensor([torch.nan, 1.0]),
            "index": torch.arange(40 * 40).view(40, 40) - 700,
            "large": torch.tensor([2**62, -(2**63), 3]),
            "flags": torch.rand(50, 3) > 0.7,
            "bytes": torch.arange(256, dtype=torch.uint8),
            "short": torch.arange(-300, 300, dtype=torch.int16).view(2, 3, 100),
            "brain": torch.randn(7, 9).bfloat16(),
            "brain_mask": mask.bfloat16(),
            "eighth": torch.randn(11).to(torch.float8_e4m3fn),
            "complex": torch.randn(5, dtype=torch.complex64),
            "scalar": torch.tensor(0.1),
            "step": torch.tensor(12345678),
            "none": torch.empty(0, 7),
            "book": torch.randn(13)[torch.randint(0, 13, (20, 30))],
            "ternary_brain": torch.tensor([0.0, 0.3, -0.7]).bfloat16()[torch.randint(0, 3, (20, 30))],
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.register_buffer("view", torch.randn(6, 8).t()[1:])

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(images)))


@pytest.mark.parametrize("half_precision", [True, False])
def test_a_network_of_ones_own_is_restored_with_all_its_names_shapes_and_types(
    half_precision: bool, tmp_path: Path
) -> None:
    network = Own()
    report = write_packed(Checkpoint(Path("x"), OWN, network.state_dict(), EXTRA), tmp_path / "a", half_precision)
    after = read_packed(tmp_path / "a")  # there is no module `nets`: nothing is imported
    assert after.spec == OWN and after.extra == EXTRA
    expected = {name: tensor for name, tensor in network.state_dict().items() if "tracked" not in name}
    assert list(after.state_dict) == list(expected)
    for name, tensor in after.state_dict.items():
        kept = stored_values(expected[name], half_precision).contiguous()
        assert tensor.dtype == kept.dtype and tensor.shape == kept.shape, name
        nonzero = kept.float() != 0 if not kept.is_complex() else kept != 0
        assert tensor[nonzero].reshape(-1).view(torch.uint8).equal(kept[nonzero].reshape(-1).view(torch.uint8)), name
    kinds = {layer.name: layer.kind for layer in report.layers}
    assert kinds["mask"] == kinds["book"] == kinds["flags"] == Kind.BOOK
    assert kinds["ternary_brain"] == Kind.GRID and kinds["index"] == kinds["brain"] == Kind.HALF
    assert kinds["nan"] == kinds["large"] == kinds["complex"] == Kind.RAW


@pytest.mark.parametrize("half_precision", [True, False])
def test_what_is_evaluated_is_what_is_packed(half_precision: bool, tmp_path: Path) -> None:
    network = Own().eval()
    images = torch.randn(50, 24)
    network.train()(images)  # running statistics that are no 16-bit numbers
    network.eval()
    evaluated, packed = as_stored(network, half_precision), Own().eval()
    write_packed(Checkpoint(Path("x"), OWN, network.state_dict()), tmp_path / "a", half_precision)
    packed.load_state_dict(read_packed(tmp_path / "a").state_dict)
    assert torch.equal(evaluated(images), packed(images))
    assert torch.equal(evaluated(images), network(images)) is not half_precision
    assert evaluated.norm.running_var.half().float().equal(evaluated.norm.running_var) is half_precision


def test_files_of_version_1_are_read() -> None:
    after = read_packed(Path(__file__).parent.parent / "reference" / "packed_version_1.safetensors")
    assert after.spec == TINY and after.extra == EXTRA
    source = mixed().state_dict | {name: reference_tensors("tiny")[name] for name in (BOOK, REPEATED)}
    for name, tensor in after.state_dict.items():
        assert same_bytes(tensor, stored_values(source[name]))
    assert after.state_dict.keys() == {name for name in source if "tracked" not in name}


def test_the_memory_layout_does_not_matter(tmp_path: Path) -> None:
    convolutions = {name: tensor for name, tensor in mixed().state_dict.items() if tensor.ndim == 4}
    other = {name: t.contiguous(memory_format=torch.channels_last) for name, t in convolutions.items()}
    assert not other[TERNARY].is_contiguous()
    first, _ = restored(mixed(), tmp_path)
    second, _ = restored(Checkpoint(Path("x"), TINY, mixed().state_dict | other, EXTRA), tmp_path)
    assert all(same_bytes(tensor, second.state_dict[name]) for name, tensor in first.state_dict.items())


def test_zeros_lose_their_sign_in_ternary_and_sparse_layers(tmp_path: Path) -> None:
    ternary = reference_tensors("tiny")[TERNARY] * -1.0
    sparse = torch.tensor([-0.0, -0.0, *range(2, 16)]).sqrt().view(2, 8)
    assert (ternary.signbit() & (ternary == 0)).any()
    after, report = restored(tiny({TERNARY: ternary, DENSE: sparse}), tmp_path)
    assert (layer_of(report, TERNARY).kind, layer_of(report, DENSE).kind) == (Kind.GRID, Kind.SPARSE)
    for name, tensor in ((TERNARY, ternary), (DENSE, sparse)):
        assert torch.equal(after.state_dict[name], stored_values(tensor))
        assert not after.state_dict[name][tensor == 0].signbit().any()
