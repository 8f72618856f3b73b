"""A look at every image file before it is used: which are damaged, what distinguishes them, what is white in them.

All files of a data set are read and decoded once, up to `THOROUGH` bytes. Of a larger one three blocks a file are read,
and those files are decoded that do not begin and end as a JPEG, PNG or WebP file of 8 bit does.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from engine.images.decoding import BITS, GONE, TOPS, BadImages, Fault, Range, White, deep_range
from engine.program.errors import UserError
from engine.program.report import narrate, progress
from engine.store.files import write_whole

THOROUGH = 4 * 2**30
BLOCK = 4096  # bytes at the start, in the middle and at the end of a file
MANY, LARGE = 5000, 2**30  # files and bytes; looking at more takes a while
CHUNK = 64  # files a thread looks at before it hands over

KINDS = {"whole": "grey of more than 8 bit", "floating": "floating-point values", "colour": "colours of 16 bit"}

Files = Sequence[tuple[str, int]]  # and their labels


@dataclass(frozen=True)
class Survey:
    """What a look at all image files found.

    Attributes:
        digest: SHA-256 of the files' names, sizes and contents, in their order.
        white: in those of more than 8 bit.
        lines: what the user should know.
    """

    digest: str
    white: White
    lines: list[str]


class Look(NamedTuple):
    """What a look at one file found: a digest of its size and content, and what is wrong or of more than 8 bit."""

    digest: bytes
    fault: Fault | None = None
    range: Range | None = None


def stamp(folder: Path, files: Files) -> str:
    """SHA-256 of names below `folder`, labels, sizes and times: while it is the same, no file has changed."""
    sha = hashlib.sha256()
    for (file, label), name in zip(files, _names(folder, files), strict=True):
        try:
            status = os.stat(file)
            state = f"{status.st_size}/{status.st_mtime_ns}/{status.st_ctime_ns}"
        except OSError:
            state = "gone"
        sha.update(name + f"/{label}/{state}\n".encode())
    return sha.hexdigest()


def survey(root: Path, files: Files, threads: int, kept: Path) -> Survey:
    """Look at all `files` below `root`, or read what an earlier look found from `kept`.

    BadImages names what can't be used. The caller sees to it that `kept` has another name once a file has changed;
    those of other names that begin alike are removed.
    """
    with suppress(OSError, ValueError, TypeError, KeyError):
        return _remembered(kept)
    found = _look_at_all(root, files, threads)
    with suppress(UserError, OSError):  # a folder that can't be written to works as well, only slower
        for other in kept.parent.glob(f"{kept.name.partition('-')[0]}-*{kept.suffix}"):
            other.unlink()
        write_whole(json.dumps(asdict(found)).encode(), kept)
    return found


def _remembered(file: Path) -> Survey:
    found = json.loads(file.read_text())
    white = White(BITS[BITS.index(found["white"]["bits"])], TOPS[TOPS.index(found["white"]["top"])])
    return Survey(str(found["digest"]), white, list(map(str, found["lines"])))


def _names(folder: Path, files: Files) -> Iterator[bytes]:
    """The files' names below `folder`, as bytes: they need not be text."""
    start = len(str(folder / "x")) - 1
    return (file[start:].encode(errors="surrogateescape") for file, _ in files)


def _look_at_all(root: Path, files: Files, threads: int) -> Survey:
    size = _total_size(files)
    thorough = size <= THOROUGH
    if len(files) > MANY or size > LARGE:
        narrate(f"{root}: looking at {len(files):,} image files for damage; once, unless they change")
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    sha, names, faults, ranges = hashlib.sha256(), _names(root, files), [], []

    def look_at(chunk: Files) -> list[Look]:
        return [_look(file, thorough) for file, _ in chunk]

    pool = ThreadPoolExecutor(threads)
    try:
        looks = progress(pool.map(look_at, chunks), "looking at image files", len(chunks))
        for chunk, found in zip(chunks, looks, strict=True):
            for (file, _), look in zip(chunk, found, strict=True):
                sha.update(next(names) + b" " + look.digest)
                faults += [look.fault] if look.fault else []
                ranges += [(file, look.range)] if look.range else []
    finally:
        pool.shutdown(cancel_futures=True)  # an interruption waits for no more than the chunks begun
    if faults:
        raise BadImages(faults)
    white = _white(ranges)
    return Survey(sha.hexdigest(), white, _lines(ranges, white))


def _total_size(files: Files) -> int:
    total = 0
    for file, _ in files:
        with suppress(OSError):
            total += os.path.getsize(file)
    return total


def _look(path: str, thorough: bool) -> Look:
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            starts = (0, size // 2, max(0, size - BLOCK))
            blocks = [file.readall()] if thorough else [os.pread(file.fileno(), BLOCK, start) for start in starts]
        digest = hashlib.sha256(b"%d " % size + b"".join(blocks)).digest()
        is_sound = not thorough and _is_sound(blocks[0], blocks[-1], size)
        return Look(digest, range=None if is_sound else deep_range(path))
    except FileNotFoundError:
        return Look(b"", Fault(path, *GONE))
    except BadImages as error:
        return Look(b"", error.faults[0])
    except OSError as error:
        return Look(b"", Fault(path, f"can't be read ({error.strerror})"))


def _is_sound(head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file of 8-bit samples begins as a JPEG, PNG or WebP file does, and also ends as such."""
    if head.startswith(b"\xff\xd8\xff"):
        return tail.endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        bits = head[24:25]
        return bits != b"\x10" and tail.endswith(b"IEND\xaeB`\x82")
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP" and int.from_bytes(head[4:8], "little") + 8 <= size


def _white(ranges: list[tuple[str, Range]]) -> White:
    """The white that all images of more than 8 bit have in common; BadImages where they can't be scaled."""
    highest: dict[str, tuple[float, str]] = {}
    for path, (kind, _, high) in ranges:
        highest[kind] = max(highest.get(kind, (0.0, path)), (high, path))
    high, path = highest.get("colour", (255.0, ""))
    if high < 64:
        what = "holds colours of less than 16 bit as 16-bit values, of which only the upper 8 bit are read"
        raise BadImages([Fault(path, what, "save it and its like with 8 bit")])
    top, path = highest.get("floating", (1.0, ""))
    if 1 < top < 2:
        what = f"holds values from 0 to {top:g}, and 1 or 255 should be white"
        raise BadImages([Fault(path, what, "scale and save it and its like anew")])
    whole, _ = highest.get("whole", (TOPS[-1], ""))
    bits = next(bits for bits in BITS if whole < 2**bits)
    return White(bits, next(white for white in TOPS if top <= white))


def _lines(ranges: list[tuple[str, Range]], white: White) -> list[str]:
    """Say how images of more than 8 bit are scaled."""
    kinds = Counter(found.kind for _, found in ranges)
    tops = {"whole": 2**white.bits - 1, "floating": white.top, "colour": 2**16 - 1}
    return [
        f"{number:,} images hold {KINDS[kind]}: 0 to {tops[kind]:,.0f} becomes 0 to 255"
        for kind, number in sorted(kinds.items())
    ]
