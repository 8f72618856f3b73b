"""What a user sees: progress bars on a terminal, plain whole lines in a file, and tables."""

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from tqdm import tqdm

from engine.program import processes
from engine.program.errors import printable

Item = TypeVar("Item")

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Whether what `narrate` and `progress` show is left out."""
    global _quiet  # one console
    _quiet = quiet


def say(line: str = "") -> None:
    """Print one line at once, also into a redirected log, without breaking a progress bar; first process only."""
    if not processes.is_first():
        return
    tqdm.write("\n".join(map(printable, line.split("\n"))), file=sys.stdout)
    sys.stdout.flush()


def narrate(line: str) -> None:
    """`say` it, unless the user wants totals alone (`--quiet`)."""
    if not _quiet:
        say(line)


def progress(items: Iterable[Item], description: str, total: int) -> "tqdm[Item]":
    """Iterate with a progress bar on a terminal; silently with `--quiet`, and where the console is redirected."""
    silent = _quiet or not (processes.is_first() and sys.stderr.isatty() and sys.stdout.isatty())
    return tqdm(items, desc=description, total=total, leave=False, disable=silent)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay out rows under headers, first column left, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    first = [row[0].ljust(widths[0]) for row in cells]
    lines = [left + line[widths[0] :] for left, line in zip(first, lines, strict=True)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def duration(seconds: float) -> str:
    """A time as people say it: 1 h 20 min, 4 min, 12 s."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def short(value: object) -> str:
    """A setting as people write it: 0.45, 1e-05, auto."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def with_unit(number: float) -> str:
    """A large number with the unit that reads best: 8055124 is 8.06M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.2f}{unit}"
    return f"{number:.0f}"
