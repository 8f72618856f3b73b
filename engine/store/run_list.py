"""The runs that a folder keeps: what differs between them, what they reached, how far they are."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.program.report import table
from engine.store.run_folder import Record

DIGESTS = ("sha256", "data", "init_sha256", "teacher_sha256")  # what only their names tell a reader


@dataclass(frozen=True)
class Found:
    """A run on disk: its folder, the arguments that shape it, its result if it is finished, the log of its epochs."""

    folder: Path
    arguments: Record
    result: Record | None
    log: list[Record]

    @property
    def state(self) -> str:
        if self.result:
            return "diverged" if self.result.get("diverged") else "finished"
        return f"{self.log[-1].get('phase', '')} {self.log[-1]['epoch']}".strip() if self.log else "begun"


def runs_in(folder: Path) -> list[Found]:
    """All runs in `folder`, by name; what can't be read is none."""
    found = []
    for path in sorted(folder.glob("*/arguments.json")):
        try:
            arguments = json.loads(path.read_text())
            log = [json.loads(line) for line in _text(path.with_name("log.jsonl")).splitlines()]
            result = json.loads(_text(path.with_name("result.json")) or "null")
        except (OSError, ValueError):
            continue
        if isinstance(arguments, dict):
            found.append(Found(path.parent, arguments, result if isinstance(result, dict) else None, log))
    return found


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def differences(arguments: list[Record]) -> list[str]:
    """Of each run's arguments those in which not all are equal, as `name value` with commas between."""
    missing = object()
    names = dict.fromkeys(name for each in arguments for name in each if name not in DIGESTS)
    apart = [
        name for name in names if any(each.get(name, missing) != arguments[0].get(name, missing) for each in arguments)
    ]
    return [", ".join(f"{name} {_short(each[name])}" for name in apart if name in each) for each in arguments]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + " ".join("=".join(map(str, v)) if isinstance(v, list) else str(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def list_of(folder: Path) -> str:
    """A table of all runs in `folder`; a line where there are none."""
    if not (found := runs_in(folder)):
        return f"{folder} holds no runs"
    rows = []
    for run, differs in zip(found, differences([run.arguments for run in found]), strict=True):
        best = run.result or max(run.log, key=lambda record: record["accuracy"], default={})
        shown = [f"{best[key]:.2f}%" if isinstance(best.get(key), float) else "-" for key in ("accuracy", "zeros")]
        rows.append([run.folder.name, *shown, run.state, differs])
    return table(["run", "accuracy", "zeros", "state", "what differs"], rows)
