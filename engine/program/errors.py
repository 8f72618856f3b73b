"""What is wrong, in one line. Imports no torch."""

import re

EXIT_WRONG_INPUT = 2
EXIT_LOST = 1

OUT_OF_MEMORY = re.compile(
    r"out of memory|can.t allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED|"
    r"worker .*killed by signal: Killed|insufficient shared memory",
    re.IGNORECASE,
)


class UserError(Exception):
    """The user's input is wrong. The message is one line: what is wrong, where, and what to do."""


class PeerLost(Exception):
    """Another of several processes is gone, or failed and says why."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that this machine or its GPU has not enough memory, as Python and torch say it."""
    kinds = (RuntimeError, OSError)
    return isinstance(error, MemoryError) or isinstance(error, kinds) and bool(OUT_OF_MEMORY.search(str(error)))
