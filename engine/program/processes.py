"""Which of several processes this one is, as `torchrun` says it in the environment. Imports no torch."""

import os
import re
from dataclasses import dataclass

from engine.program.errors import UserError

MAX_PORT = 65535


@dataclass(frozen=True)
class Place:
    """Number `rank` of `world_size` processes, which meet at `address`:`port`; `local_rank` counts on its machine."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def place() -> Place | None:
    """This process's place among several; None for a single one. UserError where the environment is wrong.

    RANK and WORLD_SIZE make several processes only together: a cluster may set one of them for other ends.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return None
    size = _number("WORLD_SIZE", "a whole number above 0", 1)
    number = _number("RANK", f"a process number from 0 to {size - 1}", 0, size - 1)
    if size == 1:
        return None
    local = _number("LOCAL_RANK", f"a process number from 0 to {size - 1}", 0, size - 1, default="0")
    address = os.environ.get("MASTER_ADDR", "").strip()
    if not address:
        raise _wrong("MASTER_ADDR", "the first process's host name or address")
    return Place(number, size, local, address, _number("MASTER_PORT", f"a port from 1 to {MAX_PORT}", 1, MAX_PORT))


def _number(name: str, wanted: str, low: int, high: int = 10**6, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise _wrong(name, wanted)
    return int(text)


def _wrong(name: str, wanted: str) -> UserError:
    is_now = f"is {os.environ[name]!r}" if name in os.environ else "is not set"
    return UserError(
        f"the environment asks for several processes, but {name} {is_now}, not {wanted}: start them with torchrun, "
        f"which sets it, or unset RANK and WORLD_SIZE for a single process"
    )


def world_size() -> int:
    """How many processes there are; 1 without `torchrun`."""
    here = place()
    return here.world_size if here else 1


def rank() -> int:
    """This process's number; 0 in a single process."""
    here = place()
    return here.rank if here else 0


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0
