"""The three programs, run in this process on real images (scikit-learn's digits)."""

import itertools
import json
from pathlib import Path
from unittest.mock import patch

import engine.objective
import model_compound_scaling.search
import model_quantization.grid
import model_quantization.plots
import model_scoring.scoring
from model_compound_scaling.arguments import parser as scaling_parser
from model_quantization.arguments import parser as quantization_parser
from model_scoring.arguments import parser as scoring_parser

DIGITS = "--dataset digits --image-size 8 --batch-size 479 --no-cuda --amp off".split()  # three steps an epoch
FILES = ("last.pt", "log.jsonl", "arguments.json")


def scale(save_dir: Path, *arguments: str) -> int:
    command = [*DIGITS, "--phi", "1", "--save-dir", str(save_dir), *arguments]
    return model_compound_scaling.search.run(scaling_parser().parse_args(command))


def quantize(checkpoint: Path, save_dir: Path, *arguments: str, drawn: bool = False) -> int:
    """Run stage 2; its pictures take as long as its training here, and are drawn only where a test looks at them."""
    args = quantization_parser().parse_args(
        ["--model-dict", str(checkpoint), *DIGITS, "--save-dir", str(save_dir), *arguments]
    )
    if drawn:
        return model_quantization.grid.run(args)
    with patch.multiple(model_quantization.plots, plot_sweep=not_drawn, plot_layers=not_drawn):
        return model_quantization.grid.run(args)


def not_drawn(*arguments: object) -> Path:
    """In the place of a function that draws something, and returns where."""
    return Path("not_drawn.png")


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
