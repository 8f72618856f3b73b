"""A run's log as TensorBoard shows it: `--tensorboard`."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.program.errors import UserError


def check_tensorboard() -> None:
    """Raise UserError where TensorBoard is not installed."""
    if not find_spec("tensorboard"):
        raise UserError("--tensorboard: the package is not installed; pip install tensorboard, or leave the flag out")


class Events:
    """Event files in `folder`, continued after so many `epochs`."""

    def __init__(self, folder: Path, epochs: int):
        from torch.utils.tensorboard import SummaryWriter  # not before: it needs the package

        self._writer: Any = SummaryWriter(str(folder), purge_step=epochs)

    def add(self, record: dict[str, Any], epoch: int) -> None:
        """Add every number of a record of the log."""
        for name, value in numbers(record):
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in nested dicts and lists, each with its path: `layers/fc.weight/centroids/0`."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(part, f"{name}/{key}" if name else str(key))
    elif isinstance(value, int | float) and name != "epoch":
        yield name, value
