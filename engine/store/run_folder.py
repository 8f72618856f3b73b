"""A run's folder: the arguments it was made with, its resumable state, its best networks, its log.

    FOLDER/arguments.json   every argument that shapes the result
    FOLDER/last.pt          the state after the last whole epoch: what resuming reads
    FOLDER/best*.pt         the best network so far (of each phase)
    FOLDER/log.jsonl        one JSON line an epoch
    FOLDER/events/          the log for TensorBoard, with --tensorboard
    FOLDER/seconds          what the whole epochs took, over all processes that worked on this run
    FOLDER/result.json      written when the run is finished
    FOLDER/lock             held by the process that is working on this run, and named in it

`engine.fit` says in which order they are written.

The folder's name ends in a digest of the arguments: runs with different arguments never share a folder.
"""

import hashlib
import json
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from engine import distributed
from engine.program import processes
from engine.program.errors import UserError
from engine.program.report import say
from engine.store.checkpoint import Content, read, save
from engine.store.events import Events, check_tensorboard
from engine.store.files import hold, write_text, write_whole

Record = dict[str, Any]
"""Plain values by name: an epoch as the log has it, or the result of a run."""


def shaping(recipe: Any) -> Record:
    """What of a recipe, a dataclass, shapes a run: its fields, but for those that are as their defaults have them.

    A new field with a default leaves the folders of earlier runs what they were.
    """
    values = {field.name: (getattr(recipe, field.name), field.default) for field in fields(recipe)}
    return {name: value for name, (value, default) in values.items() if value != default}


class Run:
    """One run in `parent`, found again by its label and its arguments.

    `history`, one dict an epoch, and `state` come from `last.pt` when the run is resumed. With `tensorboard`, epochs
    are noted for it, too.
    """

    def __init__(self, parent: Path, label: str, arguments: dict[str, Any], tensorboard: bool = False):
        self.arguments = json.loads(json.dumps(arguments))
        digest = hashlib.sha256(json.dumps(self.arguments, sort_keys=True).encode()).hexdigest()
        self.label = label
        self.folder = parent / f"{label}-{digest[:6]}"
        self.history: list[Record] = []
        self.state: Content | None = None
        self._lock: TextIO | None = None
        self._tensorboard = tensorboard
        if tensorboard:
            check_tensorboard()
        self._events: Events | None = None
        self._counted_to = 0.0

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"

    @property
    def result(self) -> Record | None:
        """What `finish` wrote, or None while the run is not finished."""
        try:
            result = json.loads((self.folder / "result.json").read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):  # a damaged file: the run can finish again
            return None
        return result if isinstance(result, dict) and "accuracy" in result else None

    @property
    def log(self) -> list[Record]:
        """The records of all epochs noted so far, as `log.jsonl` has them."""
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    def open(self, resume: bool) -> None:
        """Make the folder and lock it; with `resume`, read the state that the last whole epoch left there.

        Held, a UserError, where another process is working on this run.
        """
        self._hold()
        write_text(self.folder / "arguments.json", json.dumps(self.arguments, indent=2) + "\n")
        if processes.is_first():
            (self.folder / "result.json").unlink(missing_ok=True)
            if not (resume and self.last.is_file()):
                written = ("last.pt", "log.jsonl", "seconds")
                for old in (*(self.folder / name for name in written), *self.folder.glob("best*.pt")):
                    old.unlink(missing_ok=True)
                shutil.rmtree(self.folder / "events", ignore_errors=True)
        distributed.barrier()
        if resume and self.last.is_file():
            try:
                content = _read_state(self.last)
                if content["arguments"] != self.arguments:
                    difference = self.difference(content["arguments"])
                    raise UserError(f"{self.last}: is of a run with other arguments ({difference})")
            except UserError as error:
                raise UserError(f"{error}; --no-resume starts this run afresh") from None
            self.state, self.history = content["state"], content["history"]
            self._write_log()
        self._counted_to = time.monotonic()

    def _hold(self) -> None:
        if processes.is_first():
            self._lock = self._lock or hold(self.folder / "lock")

    def adopt(self, path: Path, content: Content) -> None:
        """Take over `content` of `path`, the `last.pt` of a run with the same arguments, and what is beside it."""
        if path.resolve() != self.last.resolve():
            self._hold()
            (self.folder / "result.json").unlink(missing_ok=True)
            for file in (*path.parent.glob("best*.pt"), *path.parent.glob("seconds")):
                write_whole(file.read_bytes(), self.folder / file.name)
            save(content, self.last)

    def difference(self, theirs: dict[str, Any]) -> str:
        """Say the first argument in which a run with the arguments `theirs` differs from this one."""
        missing = object()
        keys = {**theirs, **self.arguments}
        key = next(key for key in keys if theirs.get(key, missing) != self.arguments.get(key, missing))
        return f"{key} was {theirs.get(key)} and is {self.arguments.get(key)}"

    def save_epoch(self, record: Record, state: Content) -> None:
        """Note an epoch and save what resuming after it needs."""
        self.history.append(record)
        save({"arguments": self.arguments, "state": state, "history": self.history}, self.last)
        self._write_log()
        write_text(self.folder / "seconds", f"{self.seconds:.3f}\n")
        self._counted_to = time.monotonic()
        if self._tensorboard and processes.is_first():
            self._events = self._events or Events(self.folder / "events", len(self.history) - 1)
            self._events.add(record, len(self.history) - 1)

    @property
    def seconds(self) -> float:
        """What the run took up to now, without the unfinished epochs of processes that were interrupted."""
        try:
            before = float((self.folder / "seconds").read_text())
        except (OSError, ValueError):
            before = 0.0
        return before + time.monotonic() - self._counted_to

    def _write_log(self) -> None:
        write_text(self.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))

    def finish(self, result: Record) -> None:
        """Write the result, and let other processes at this run."""
        write_text(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
        if self._events:
            self._events.close()
            self._events = None
        if self._lock:  # the first process's
            self._lock.close()
            self._lock = None


def _read_state(path: Path) -> Content:
    content = read(path)
    kinds = {"arguments": dict, "state": dict, "history": list}
    if not all(isinstance(content.get(key), kind) and content[key] for key, kind in kinds.items()):
        raise UserError(f"{path}: holds no run's state; pass the last.pt in a run's folder")
    return content


def publish(content: Content, path: Path, run: Run, runs: list[Run]) -> None:
    """Write the best network, that of `run`, to `path`; a line says what it replaces, unless that is one of `runs`."""
    if path.is_file():
        try:
            before = read(path)
        except UserError:
            before = {}
        if before.get("run") not in {each.folder.name for each in runs}:
            which = f"{before['accuracy']:.2f}%, " if isinstance(before.get("accuracy"), float) else ""
            say(f"REPLACED: {path} held another command's network ({which}{before.get('run', 'of unknown origin')})")
    save(content | {"run": run.folder.name}, path)


def resume_from(path: Path, runs: list[Run]) -> None:
    """Let the run among `runs` that `path` belongs to continue from it; UserError names what differs."""
    content = _read_state(path)
    for run in runs:
        if run.arguments == content["arguments"]:
            run.adopt(path, content)
            return
    raise UserError(
        f"--resume {path}: that run had other arguments ({runs[0].difference(content['arguments'])}); "
        f"repeat its command line, or leave --resume out to start afresh"
    )
