"""Packed files that are damaged, made up or hostile: refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from engine.program.errors import UserError
from engine.store.checkpoint import Checkpoint
from engine.store.values import stored_values
from helpers.forgeries import forged, header_of, indexed, metadata_of, refused, saved, sealed, with_header
from helpers.packed_files import (
    BOOK,
    OWN,
    REPEATED,
    TINY,
    allocating_less_than,
    mixed,
)
from model_scoring.container import ENTRY
from model_scoring.packing import read_packed, write_packed

pytestmark = pytest.mark.robustness


def test_a_forger_who_changes_nothing_is_believed(packed: bytes, packed_1: bytes, tmp_path: Path) -> None:
    for data in (forged(packed), indexed(packed, {}), saved(safetensors.numpy.load(packed_1), metadata_of(packed_1))):
        (tmp_path / "a").write_bytes(data)
        for name, tensor in read_packed(tmp_path / "a").state_dict.items():
            assert torch.equal(tensor, stored_values(mixed().state_dict[name])) or name in (BOOK, REPEATED)


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
    for length in [*range(20), *range(20, len(packed), 97), len(packed) - 1]:
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


@pytest.mark.parametrize("version", [0, 3, "1", None, [1], 1.5, True, "\n" * 9, "9" * 9999])
def test_other_versions_are_refused(version: object, packed: bytes, tmp_path: Path) -> None:
    data = saved(safetensors.numpy.load(packed), metadata_of(packed) | {"version": version})
    refused(data, tmp_path, "not 2; pack")


def test_a_file_is_not_read_as_another_version(packed: bytes, packed_1: bytes, tmp_path: Path) -> None:
    refused(saved(safetensors.numpy.load(packed), metadata_of(packed) | {"version": 1}), tmp_path, "made up")
    refused(saved(safetensors.numpy.load(packed_1), metadata_of(packed_1) | {"version": 2}), tmp_path, "made up")


@pytest.mark.parametrize("digest", ["", "0" * 63, "1" * 64, "F" * 64, 10**63, None, ["0" * 64], "\n" * 64])
def test_other_digests_are_refused(digest: object, packed: bytes, tmp_path: Path) -> None:
    data = safetensors.numpy.save(
        safetensors.numpy.load(packed), {ENTRY: json.dumps(metadata_of(packed) | {"sha256": digest})}
    )
    refused(data, tmp_path)


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
        OWN | {"num_classes": 0},
        OWN | {"num_classes": 1.5},
        OWN | {"name": 3},
        OWN | {"name": "nets"},
        OWN | {"arguments": None},
        OWN | {"more": 1},
        {"name": "imagenet_micronet", "depth": 4, "width": 32, "num_classes": 1000},
    ],
    ids=lambda spec: repr(spec)[:60],
)
def test_specs_that_make_no_sensible_network_are_refused(
    spec: dict, packed: bytes, packed_1: bytes, tmp_path: Path
) -> None:
    match = "describes no network|can't be built|has more than"
    refused(saved(safetensors.numpy.load(packed_1), metadata_of(packed_1) | {"spec": spec}), tmp_path, match)
    if all(type(value) is not float or math.isfinite(value) for value in spec.values()):
        refused(forged(packed, {"spec": spec}), tmp_path, match)


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
def test_a_file_is_not_read_as_another_network(spec: dict, packed: bytes, packed_1: bytes, tmp_path: Path) -> None:
    refused(forged(packed, {"spec": spec}), tmp_path, "damaged, or made up")
    refused(saved(safetensors.numpy.load(packed_1), metadata_of(packed_1) | {"spec": spec}), tmp_path, "made up")


def test_hostile_extra_entries_are_dropped(packed: bytes, tmp_path: Path) -> None:
    extra = {"dataset": ["digits"], "image_size": 1e9, "accuracy": [1], "state_dict": {}, "x": "x" * 1000}
    (tmp_path / "a").write_bytes(forged(packed, {"extra": extra}))
    assert read_packed(tmp_path / "a").extra == {}


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"3",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b"9" * 100_000,
        b'{"a":' * 100_000,
        b"[" + b"0," * 600_000 + b"0]",
    ],
    ids=lambda index: repr(index[:9]),
)
def test_absurd_indexes_are_refused(index: bytes, packed: bytes, tmp_path: Path) -> None:
    refused(indexed(packed, index), tmp_path, "damaged, or made up|does not say")


SHAPES = [[2**40], [2**14, 2**15], [2**62, 2**62], [0, 2**62], [-1], [1.0], ["1"], 3, None, [1] * 65, [True]]
INDEXES = [
    {"names": None},
    {"names": []},
    {"shapes": []},
    {"shapes": {}},
    {"types": []},
    {"types": {"0": "quint8"}},
    {"types": {"0": "bool"}},
    {"types": {"0": "complex64"}},
    {"types": {"0": ["float32"]}},
    {"lanes": 0},
    {"lanes": -1},
    {"lanes": 2**62},
    {"lanes": "1"},
    {"lanes": None},
    {"lanes": 1.0},
]


@pytest.mark.parametrize("index", INDEXES, ids=repr)
def test_forged_indexes_are_refused(index: dict, packed: bytes, tmp_path: Path) -> None:
    refused(forged(packed, index), tmp_path, "damaged, or made up")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: repr(shape)[:30])
def test_tensors_of_absurd_shapes_are_refused_before_they_are_made(
    shape: object, packed: bytes, tmp_path: Path
) -> None:
    own = {"spec": OWN, "names": ["w"], "shapes": [shape], "types": {}}
    refused(forged(packed, own), tmp_path, "damaged, or made up")


def test_too_many_tensors_are_refused(packed: bytes, tmp_path: Path) -> None:
    names = [str(i) for i in range(2**14 + 1)]
    own = {"spec": OWN, "names": names, "shapes": [[1]] * len(names), "types": {}}
    refused(forged(packed, own), tmp_path, "more than 16,384 tensors")


def test_no_symbols_of_an_empty_tensor_are_decoded(tmp_path: Path) -> None:
    write_packed(Checkpoint(Path("x"), OWN, {"w": torch.rand(40, 40).round()}), tmp_path / "own")
    data = forged((tmp_path / "own").read_bytes(), {"shapes": [[0, 40]]})
    refused(data, tmp_path, "words of symbols in 1 lanes")


@pytest.mark.parametrize("names", [["a", "a"], [1, "a"], [None, "a"], [["a"], "b"]], ids=repr)
def test_tensors_have_names_of_their_own(names: list, packed: bytes, tmp_path: Path) -> None:
    own = {"spec": OWN, "names": names, "shapes": [[1], [1]], "types": {}}
    refused(forged(packed, own), tmp_path, "a name of its own")
