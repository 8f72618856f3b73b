"""The three programs, run in this process on real images: every eighth of scikit-learn's digits."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

import engine.objective
import model_compound_scaling.search
import model_quantization.grid
import model_quantization.plots
import model_scoring.scoring
from engine.images.sources import Digits
from model_compound_scaling.arguments import parser as scaling_parser
from model_quantization.arguments import parser as quantization_parser
from model_scoring.arguments import parser as scoring_parser

DIGITS = "--dataset digits --image-size 8 --batch-size 60 --no-cuda --amp off".split()  # three steps an epoch
FILES = ("last.pt", "log.jsonl", "arguments.json")


@contextmanager
def few_images() -> Iterator[None]:
    """180 digits to train on and 45 to validate on."""
    read = Digits.read

    def read_few(self: Digits, split: str, size: int) -> tuple[Tensor, Tensor]:
        images, labels = read(self, split, size)
        return images[::8].contiguous(), labels[::8].contiguous()

    with patch.object(Digits, "read", read_few):
        yield


@contextmanager
def no_pictures() -> Iterator[None]:
    """Stage 2's pictures, which would take as long as its training here, are not drawn."""

    def not_drawn(*arguments: object) -> Path:
        return Path("not_drawn.png")

    with patch.multiple(model_quantization.plots, plot_sweep=not_drawn, plot_layers=not_drawn):
        yield


@few_images()
def scale(save_dir: Path, *arguments: str) -> int:
    command = [*DIGITS, "--phi", "1", "--save-dir", str(save_dir), *arguments]
    return model_compound_scaling.search.run(scaling_parser().parse_args(command))


@few_images()
def quantize(checkpoint: Path, save_dir: Path, *arguments: str, drawn: bool = False) -> int:
    """Run stage 2; its pictures are `drawn` where a test looks at them."""
    args = quantization_parser().parse_args(
        ["--model-dict", str(checkpoint), *DIGITS, "--save-dir", str(save_dir), *arguments]
    )
    with nullcontext() if drawn else no_pictures():
        return model_quantization.grid.run(args)


@few_images()
def score(checkpoint: Path, *arguments: str) -> int:
    command = ["--t-model", str(checkpoint), "--no-cuda", *arguments]
    return model_scoring.scoring.run(scoring_parser().parse_args(command))


def runs(save_dir: Path) -> list[Path]:
    return sorted(p for p in save_dir.iterdir() if p.is_dir())


def rates(run: Path) -> list[float]:
    """The learning rate of each epoch that a run notes."""
    return [json.loads(line)["lr"] for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_runs(first: Path, second: Path, files: tuple[str, ...]) -> None:
    assert [p.name for p in runs(first)] == [p.name for p in runs(second)] != []
    for one, two in zip(runs(first), runs(second), strict=True):
        for name in files:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


def interrupt_after(monkeypatch, epochs: int) -> None:
    """Let Ctrl-C arrive in the middle of the epoch after `epochs` whole ones."""
    calls = itertools.count()
    original = engine.objective.F.cross_entropy

    def cross_entropy(*args, **kwargs):
        if "reduction" not in kwargs and next(calls) == 3 * epochs + 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(engine.objective.F, "cross_entropy", cross_entropy)
