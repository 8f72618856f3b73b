"""A run's folder: the arguments it was made with, its resumable state, its best networks, its log.

    FOLDER/arguments.json   every argument that shapes the result
    FOLDER/last.pt          the state after the last whole epoch: what resuming reads
    FOLDER/best*.pt         the best network so far (of each phase)
    FOLDER/log.jsonl        one JSON line an epoch
    FOLDER/result.json      written when the run is finished
    FOLDER/lock             held by the process that is at this run, and named in it

A process may be killed between any two of these writes. The best network is saved before `last.pt`, and `last.pt`
decides: the epoch after it is repeated and gives the same bytes, and `log.jsonl` follows from it.

The folder's name ends in a digest of the arguments: runs with different arguments never share a folder.
"""

import hashlib
import json
from pathlib import Path
from typing import TextIO

from engine import UserError, distributed
from engine.checkpoint import read, save
from engine.files import hold, write_whole


class Run:
    """One run in `parent`, found again by its label and its arguments.

    `history`, one dict an epoch, and `state` come from `last.pt` when the run is resumed.
    """

    def __init__(self, parent: Path, label: str, arguments: dict):
        self.arguments = json.loads(json.dumps(arguments))
        digest = hashlib.sha256(json.dumps(self.arguments, sort_keys=True).encode()).hexdigest()
        self.label = label
        self.folder = parent / f"{label}-{digest[:6]}"
        self.history: list[dict] = []
        self.state: dict | None = None
        self._lock: TextIO | None = None

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"

    @property
    def result(self) -> dict | None:
        """What `finish` wrote, or None while the run is not finished."""
        try:
            result = json.loads((self.folder / "result.json").read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):  # a damaged file: the run can finish again
            return None
        return result if isinstance(result, dict) and "accuracy" in result else None

    @property
    def log(self) -> list[dict]:
        """The records of all epochs noted so far, as `log.jsonl` has them."""
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    def open(self, resume: bool) -> None:
        """Make the folder and lock it; with `resume`, read the state that the last whole epoch left there.

        UserError where another process is at this run.
        """
        self._hold()
        write_text(self.folder / "arguments.json", json.dumps(self.arguments, indent=2) + "\n")
        if distributed.is_first():
            (self.folder / "result.json").unlink(missing_ok=True)
            if not (resume and self.last.is_file()):
                for old in (self.last, self.folder / "log.jsonl", *self.folder.glob("best*.pt")):
                    old.unlink(missing_ok=True)
        distributed.wait_for_all()
        if resume and self.last.is_file():
            try:
                content = _read_state(self.last)
                if content["arguments"] != self.arguments:
                    raise UserError(f"{self.last}: is of a run with other arguments ({self.difference(self.last)})")
            except UserError as error:
                raise UserError(f"{error}; --no-resume starts this run afresh") from None
            self.state, self.history = content["state"], content["history"]
            self._write_log()

    def _hold(self) -> None:
        if distributed.is_first():
            self._lock = self._lock or hold(self.folder / "lock")

    def adopt(self, path: Path) -> bool:
        """Take over `path`, another run's `last.pt`, and the best networks beside it, if its arguments are this run's.
        """
        content = _read_state(path)
        if content["arguments"] != self.arguments:
            return False
        if path.resolve() != self.last.resolve():
            self._hold()
            (self.folder / "result.json").unlink(missing_ok=True)
            for best in path.parent.glob("best*.pt"):
                write_whole(best.read_bytes(), self.folder / best.name)
            save(content, self.last)
        return True

    def difference(self, path: Path) -> str:
        """Say the first argument in which the run that wrote `path` differs from this one."""
        theirs, missing = _read_state(path)["arguments"], object()
        keys = {**theirs, **self.arguments}
        key = next(key for key in keys if theirs.get(key, missing) != self.arguments.get(key, missing))
        return f"{key} was {theirs.get(key)} and is {self.arguments.get(key)}"

    def save_epoch(self, record: dict, state: dict) -> None:
        """Note an epoch and save what resuming after it needs."""
        self.history.append(record)
        save({"arguments": self.arguments, "state": state, "history": self.history}, self.last)
        self._write_log()

    def _write_log(self) -> None:
        write_text(self.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))

    @property
    def best(self) -> dict | None:
        """The record of the most accurate epoch, the first of equals; None before any."""
        return max(self.history, key=lambda record: record["accuracy"], default=None)

    def check(self, kinds: dict[str, type], *networks: str) -> None:
        """Raise ValueError unless all records have these keys and kinds, and these files of networks are there."""
        for record in self.history:
            if record.keys() != kinds.keys() or not all(isinstance(record[key], kinds[key]) for key in kinds):
                raise ValueError(f"{str(record)[:100]} is no record of an epoch")
        for name in networks:
            if not (self.folder / name).is_file():
                raise ValueError(f"{name} beside it is missing")

    def finish(self, result: dict) -> None:
        """Write the result, and let other processes at this run."""
        write_text(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
        if self._lock:  # the first process's
            self._lock.close()
            self._lock = None


def write_text(path: Path, text: str) -> None:
    """Write a text file so that no moment leaves half of it."""
    write_whole(text.encode(), path)


def _read_state(path: Path) -> dict:
    content = read(path)
    kinds = {"arguments": dict, "state": dict, "history": list}
    if not all(isinstance(content.get(key), kind) for key, kind in kinds.items()) or not (
        _is_flat(content["arguments"]) and content["history"] and all(map(_is_flat, content["history"]))
    ):
        raise UserError(f"{path}: holds no run's state; pass the last.pt in a run's folder")
    return content


def _is_flat(record: object) -> bool:
    """Whether `record` is a dict of numbers and texts by name."""
    plain = (int, float, str, bool, type(None))
    return isinstance(record, dict) and all(type(k) is str and type(v) in plain for k, v in record.items())


def resume_from(path: Path, runs: list[Run]) -> None:
    """Let the run among `runs` that `path` belongs to continue from it; UserError names what differs."""
    if not any(run.adopt(path) for run in runs):
        raise UserError(
            f"--resume {path}: that run had other arguments ({runs[0].difference(path)}); "
            f"repeat its command line, or leave --resume out to start afresh"
        )
