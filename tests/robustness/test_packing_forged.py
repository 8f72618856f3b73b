"""Streams of packed files that a forger changed, and files that are changed at random."""

from __future__ import annotations

import lzma
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
from helpers.forgeries import deflated, forged, header_of, indexed, metadata_of, refused, saved, sealed, with_header
from helpers.packed_files import (
    REPEATED,
    TINY,
)
from model import build
from model_scoring import coding, container
from model_scoring.packing import read_packed

pytestmark = pytest.mark.robustness


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
