"""Files that are whole or not there, and locks that end with their process."""

import errno
import fcntl
import os
import socket
import uuid
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from engine.program import processes
from engine.program.errors import UserError

SUFFIXES = (".pt", ".pth", ".th", ".tar", ".safetensors")
LISTED = 12  # files of a folder that an error message names
UNFINISHED = ".ec2t-"  # what the names of files begin with that are still being written
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # what file systems without locks answer


def write_whole(data: bytes | memoryview, path: Path) -> None:
    """Write a file so that no moment leaves half of it: beside `path`, flushed, then renamed over it.

    What killed processes left unfinished in that folder is removed. UserError where the file can't be written. Of
    several processes that train together, the first alone writes.
    """
    if not processes.is_first():
        return
    temporary = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")  # unique, also among hosts that share the folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(path.parent)
        with _open_locked(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); make room, or pass another folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file so that no moment leaves half of it."""
    write_whole(text.encode(), path)


def _open_locked(path: Path) -> BinaryIO:
    """Make a file that `_remove_unfinished` leaves alone as long as it is open."""
    while True:
        file = open(path, "xb")
        with suppress(OSError):  # on a file system without locks nothing is removed
            fcntl.lockf(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # it was removed before it was locked


def _remove_unfinished(folder: Path) -> None:
    """Remove the temporary files in `folder` whose processes are gone: nobody locks them."""
    for path in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError), open(path, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _flush_folder(folder: Path) -> None:
    """Let renames in `folder` outlast a power cut, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Held(UserError):
    """Another process holds a lock."""


def hold(path: Path, wait: bool = False) -> TextIO:
    """Lock the file `path`; the lock is released when the returned file is closed or the process ends, even by SIGKILL.

    Where another process holds it: wait for that, or raise Held, which names it. The lock is a POSIX record lock:
    worker processes do not inherit it, and on network file systems it holds between hosts. A file system without
    locks locks nothing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); pass another folder") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in NO_LOCKS:
            return file
        with file:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
        message = f"{path.parent}: {holder} is working on this run; wait for its end, or pass another --save-dir"
        raise Held(message) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def another(path: Path) -> str:
    return f"pass another file ({listing(path.parent)})"


def listing(folder: Path) -> str:
    """Say what lies in `folder`, checkpoints first."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    there = (path for path in folder.iterdir() if not path.name.startswith("."))
    files = sorted(there, key=lambda path: (path.suffix not in SUFFIXES, path.name))
    names = [f"{path.name}/" if path.is_dir() else path.name for path in files[:LISTED]]
    more = f" and {len(files) - LISTED} more" if len(files) > LISTED else ""
    return f"{folder} holds {', '.join(names) or 'no files'}{more}"
