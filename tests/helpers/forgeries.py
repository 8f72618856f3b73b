"""Packed files as a forger would change them, and that they are refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from engine.program.errors import UserError
from helpers.packed_files import (
    allocating_less_than,
)
from model_scoring import coding, container
from model_scoring.container import ENTRY
from model_scoring.packing import read_packed


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
