"""Packed files that are damaged, made up or hostile: refused in one line."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from engine.program.errors import UserError
from engine.store.checkpoint import Checkpoint
from engine.store.values import stored_values
from helpers.packed_files import (
    BOOK,
    OWN,
    REPEATED,
    TINY,
    allocating_less_than,
    mixed,
)
from model import build
from model_scoring import coding, container
from model_scoring.container import ENTRY
from model_scoring.packing import read_packed, write_packed

pytestmark = pytest.mark.robustness

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


def with_header(data: bytes, header: bytes) -> bytes:
    """The packed file `data` with another header."""
    return len(header).to_bytes(8, "little") + header + data[8 + len(header_of(data)) :]


def saved(arrays: dict, metadata: dict) -> bytes:
    """A packed file of any tensors and metadata, with the digest of that."""
    text = json.dumps(metadata, separators=(",", ":"))
    return sealed(safetensors.numpy.save(arrays, {ENTRY: text}))


def metadata_of(data: bytes) -> dict:
    return json.loads(json.loads(header_of(data))["__metadata__"][ENTRY])


def deflated(data: bytes) -> np.ndarray:
    return np.frombuffer(coding.compress(coding.DEFLATE, data), np.uint8)


def forged(data: bytes, index: dict | None = None, streams: dict | None = None) -> bytes:
    """The packed file `data` with entries of the index or streams replaced, and the digest of that."""
    content = container.open_sealed(data)
    old = container.streams_of(content, 10**6)
    kept = {key: value for key, value in content.index.items() if key != "streams"}
    return container.seal(kept | (index or {}), old | (streams or {}))[0]


def indexed(data: bytes, index: dict | bytes, rest: bytes = b"") -> bytes:
    """The packed file `data` with another index, or entries of it, and something behind its streams."""
    content = container.open_sealed(data)
    text = index if isinstance(index, bytes) else json.dumps(content.index | index).encode()
    streams = np.append(content.arrays["streams"], np.frombuffer(rest, np.uint8))
    return saved({"index": deflated(text), "streams": streams}, metadata_of(data))


@pytest.fixture(scope="module")
def packed_1() -> bytes:
    """A packed file of version 1."""
    return (Path(__file__).parent.parent / "reference" / "packed_version_1.safetensors").read_bytes()


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


def places(change: Callable[[list], object]) -> Callable[[bytes], bytes]:
    """A forger who changes where streams are said to lie."""
    return lambda data: indexed(data, {"streams": change(container.open_sealed(data).index["streams"])})


def changed(key: str, change: Callable[[np.ndarray], object]) -> Callable[[bytes], bytes]:
    """A forger who changes one stream."""
    return lambda data: forged(
        data, streams={key: change(container.streams_of(container.open_sealed(data), 10**6)[key])}
    )


def replaced(index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def replace(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = value
        return array

    return replace


def ternary_of(code: bytes, position: int) -> Callable[[bytes], bytes]:
    """A forger who replaces the code of the ternary layer that is not range coded, 576 weights."""

    def forge(data: bytes) -> bytes:
        streams = container.streams_of(container.open_sealed(data), 10**6)
        coders = replaced(int(np.flatnonzero(streams["coders"] < 5)[0]), position)(streams["coders"])
        replacement = {"symbols": np.frombuffer(code, np.uint8), "sizes": np.array([len(code)]), "coders": coders}
        return forged(data, streams=replacement)

    return forge


CHANGES = {
    "one short": lambda array: array[:-1],
    "one more": lambda array: np.append(array, array[-1:]),
    "empty": lambda array: array[:0],
}
BOMB = bytes(20_000_000)
FORGERIES = {
    **{f"{key} {how}": changed(key, change) for key in container.STREAMS for how, change in CHANGES.items()},
    "streams that are not listed": places(lambda listed: None),
    "a stream less in the list": places(lambda listed: listed[:-1]),
    "a stream more in the list": places(lambda listed: [*listed, [0, 0]]),
    "a stream of negative size": places(lambda listed: [[-1, 0], *listed[1:]]),
    "a stream of absurd size": places(lambda listed: [*listed[:-1], [2**62, 0]]),
    "a stream of another size": places(lambda listed: [[listed[0][0] + 1, listed[0][1]], *listed[1:]]),
    "a stream without compressor": places(lambda listed: [[listed[0][0], 3], *listed[1:]]),
    "a stream of another compressor": places(lambda listed: [*listed[:-1], [listed[-1][0], 1]]),
    "a place that is none": places(lambda listed: [3, *listed[1:]]),
    "bytes behind the streams": lambda data: indexed(data, {}, b"more"),
    "a number cut off": places(lambda listed: [*listed[:-2], [listed[-2][0] + 2, 0], [listed[-1][0] - 2, 0]]),
    "streams that are a bomb": changed("kinds", lambda array: np.zeros(20_000_000, np.uint8)),
    "a kind that is none": changed("kinds", replaced(-1, 5)),
    "a coder that is none": changed("coders", replaced(0, 8)),
    "other levels": changed("levels", replaced(0, 3)),
    "one level": changed("levels", lambda array: np.zeros_like(array)),
    "a grid of even levels": changed("levels", lambda array: array ^ 1),
    "the most levels": changed("levels", lambda array: np.full_like(array, 255)),
    "kinds in another order": changed("kinds", lambda array: array[::-1].copy()),
    "a size beyond the file": changed("sizes", replaced(0, 2**32 - 1)),
    "a size of zero": changed("sizes", replaced(0, 0)),
    "an infinite step": changed("steps", lambda array: np.full(array.size // 4, np.inf, "<f4").view(np.uint8)),
    "a step that is NaN": changed("steps", lambda array: np.full(array.size, 255, np.uint8)),
    "an infinite value": changed("raw", lambda array: np.full(array.size // 4, -np.inf, "<f4").view(np.uint8)),
    "a mask with more ones": changed("masks", replaced(0, 255)),
    "a mask with fewer ones": changed("masks", replaced(-1, 0)),
    "infinite float16 values": changed("half", lambda array: np.full_like(array, np.inf)),
    "other probabilities": changed("depths", lambda array: array[::-1].copy()),
    "no probabilities": changed("depths", lambda array: np.full_like(array, 255)),
    "probabilities that are none": changed("depths", lambda array: np.full_like(array, 254)),
    "words of zeros": changed("words", lambda array: np.zeros_like(array)),
    "words of ones": changed("words", lambda array: np.full_like(array, 2**32 - 1)),
    "a word changed": changed("words", lambda array: array ^ 1),
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
    "symbols that are range coded": ternary_of(b"", 5),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_forged_streams_are_refused(forge: Callable[[bytes], bytes], packed: bytes, tmp_path: Path) -> None:
    data = forge(packed)
    assert data != packed
    refused(data, tmp_path, "damaged, or made up|NaN or infinite")


def test_the_reason_of_a_refusal_is_said(packed: bytes, tmp_path: Path) -> None:
    refused(changed("kinds", replaced(1, 5))(packed), tmp_path, "58 coders|6 coders of|no kind 5")
    refused(changed("raw", lambda array: array[1:])(packed), tmp_path, "raw end too early")
    refused(changed("sizes", lambda array: np.append(array, array))(packed), tmp_path, "1 sizes too many")
    refused(ternary_of(b"", 5)(packed), tmp_path, "probabilities of")
    refused(forged(packed, {"types": {"0": "bool"}}), tmp_path, "conv1.weight is bool")


def test_a_forger_whose_symbols_fit_is_believed(packed: bytes, tmp_path: Path) -> None:
    for position, code in ((0, bytes(116)), (3, deflated(bytes(192))), (4, deflated(b""))):
        (tmp_path / "a").write_bytes(ternary_of(bytes(code), position)(packed))
        assert not read_packed(tmp_path / "a").state_dict[REPEATED].any()


@pytest.mark.parametrize("key", container.VERSION_1)
@pytest.mark.parametrize("how", [*CHANGES, "missing", "as float64", "ones"])
def test_forged_streams_of_version_1_are_refused(key: str, how: str, packed_1: bytes, tmp_path: Path) -> None:
    arrays = safetensors.numpy.load(packed_1)
    array = arrays.pop(key)
    if how == "as float64":
        arrays[key] = array.astype(np.float64)
    elif how == "ones":
        arrays[key] = np.frombuffer(b"\xff" * array.nbytes, array.dtype)
    elif how != "missing":
        arrays[key] = CHANGES[how](array)
    data = saved(arrays, metadata_of(packed_1))
    if (key, how) == ("low", "ones"):  # other values, and as good
        (tmp_path / "a").write_bytes(data)
        assert read_packed(tmp_path / "a").spec == TINY
    else:
        refused(data, tmp_path, "damaged, or made up|NaN or infinite")


@pytest.mark.parametrize(
    "entry",
    [
        b'"index":{"dtype":"U8","shape":[281474976710656],"data_offsets":[0,281474976710656]}',
        b'"index":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}',
        b'"index":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}',
        b'"index":{"dtype":"U8","shape":[0],"data_offsets":[5,0]}',
        b'"index":{"dtype":"X9","shape":[0],"data_offsets":[0,0]}',
        b'"index":{"dtype":"F8_E4M3","shape":[0],"data_offsets":[0,0]}',
        b'"index":{}',
        b'"index":[]',
    ],
)
def test_absurd_declarations_are_refused(entry: bytes, packed: bytes, tmp_path: Path) -> None:
    header = header_of(packed)
    declared = re.search(rb'"index":\{[^}]*\}', header)[0]
    refused(sealed(with_header(packed, header.replace(declared, entry))), tmp_path, "damaged, or made up")
    both = declared + b"," + entry
    refused(sealed(with_header(packed, header.replace(declared, both))), tmp_path, "damaged, or made up")


@pytest.mark.parametrize("dtype", [b"I8", b"BOOL", b"F8_E4M3", b"F8_E8M0", b"F4", b"U64"])
def test_other_types_of_tensors_are_refused(dtype: bytes, packed: bytes, tmp_path: Path) -> None:
    header = header_of(packed).replace(b'"U8"', b'"%s"' % dtype)
    refused(sealed(with_header(packed, header)), tmp_path, "damaged, or made up")


def test_a_tensor_declared_twice_is_refused(packed: bytes, tmp_path: Path) -> None:
    header = header_of(packed)
    index, streams = (re.search(rb'"%s":\{[^}]*\}' % key, header)[0] for key in (b"index", b"streams"))
    twice = index + b"," + streams.replace(b"streams", b"index")
    refused(sealed(with_header(packed, header.replace(index, twice))), tmp_path, "made up")


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
