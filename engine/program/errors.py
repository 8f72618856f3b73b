"""What is wrong, in one line. Imports no torch."""

import re
import unicodedata

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
    return isinstance(error, MemoryError) or (isinstance(error, kinds) and bool(OUT_OF_MEMORY.search(str(error))))


def printable(text: str) -> str:
    """`text` as one line, whatever the names of files in it hold; bytes that are no UTF-8 become `\\xNN`."""
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    if "\udc80" <= character <= "\udcff":  # what Python reads such a byte as
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
