"""Checkpoints of other programs: how they are read or refused."""

from pathlib import Path

import pytest
import torch

from engine.program.errors import UserError
from engine.store.checkpoint import read_network
from helpers.networks import TINY


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_network(path)
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).startswith(str(path))
    return str(caught.value)


def check_read(content: object, expected: dict, path: Path) -> None:
    """`content`, saved, is read as the network with the tensors `expected`."""
    torch.save(content, path)
    found = read_network(path)
    assert found.spec == TINY and found.state_dict.keys() == expected.keys()
    assert all(torch.equal(found.state_dict[name], tensor) for name, tensor in expected.items())


def prefixed(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}
