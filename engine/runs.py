"""A run's folder: the arguments it was made with, its resumable state, its best networks, its log.

    FOLDER/arguments.json   every argument that shapes the result
    FOLDER/last.pt          the state after the last whole epoch: what resuming reads
    FOLDER/best*.pt         the best network so far (of each phase)
    FOLDER/log.jsonl        one JSON line an epoch
    FOLDER/result.json      written when the run is finished

The folder's name ends in a digest of the arguments: runs with different arguments never share a folder.
"""

import hashlib
import json
from pathlib import Path

from engine import UserError, distributed
from engine.checkpoint import read, save, write_whole


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

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"

    @property
    def result(self) -> dict | None:
        """What `finish` wrote, or None while the run is not finished."""
        try:
            return json.loads((self.folder / "result.json").read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):  # a damaged file: the run can finish again
            return None

    @property
    def log(self) -> list[dict]:
        """The records of all epochs noted so far, as `log.jsonl` has them."""
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    def open(self, resume: bool) -> None:
        """Make the folder; with `resume`, read the state that the last whole epoch left there."""
        write_text(self.folder / "arguments.json", json.dumps(self.arguments, indent=2) + "\n")
        if distributed.is_first():
            (self.folder / "result.json").unlink(missing_ok=True)
            if not resume:
                self.last.unlink(missing_ok=True)  # should this run be interrupted in its first epoch
        distributed.wait_for_all()
        if resume and self.last.is_file():
            try:
                content = _read_state(self.last)
            except UserError as error:
                raise UserError(f"{error}; --no-resume starts this run afresh") from None
            self.state, self.history = content["state"], content["history"]

    def adopt(self, path: Path) -> bool:
        """Take over the state in `path`, another run's `last.pt`, if its arguments are this run's."""
        content = _read_state(path)
        if content["arguments"] != self.arguments:
            return False
        if path.resolve() != self.last.resolve():
            save(content, self.last)
        return True

    def difference(self, path: Path) -> str:
        """Say the first argument in which the run that wrote `path` differs from this one."""
        theirs = _read_state(path)["arguments"]
        key = next(key for key in {**theirs, **self.arguments} if theirs.get(key) != self.arguments.get(key))
        return f"{key} was {theirs.get(key)} and is {self.arguments.get(key)}"

    def save_epoch(self, record: dict, state: dict) -> None:
        """Note an epoch and save what resuming after it needs."""
        self.history.append(record)
        save({"arguments": self.arguments, "state": state, "history": self.history}, self.last)
        write_text(self.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))

    def finish(self, result: dict) -> None:
        write_text(self.folder / "result.json", json.dumps(result, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that no moment leaves half of it."""
    write_whole(text.encode(), path)


def _read_state(path: Path) -> dict:
    content = read(path)
    kinds = {"arguments": dict, "state": dict, "history": list}
    if not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path}: holds no run's state; pass the last.pt in a run's folder")
    return content


def resume_from(path: Path, runs: list[Run]) -> None:
    """Let the run among `runs` that `path` belongs to continue from it; UserError names what differs."""
    if not any(run.adopt(path) for run in runs):
        raise UserError(
            f"--resume {path}: that run had other arguments ({runs[0].difference(path)}); "
            f"repeat its command line, or leave --resume out to start afresh"
        )
