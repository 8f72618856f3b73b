"""What the console and TensorBoard show of a run."""

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from engine.program.report import set_quiet
from helpers.refusals import refusal
from helpers.stages import quantize, runs

ONE_PAIR = "--epochs 1 --retrain-epochs 1 --ini-c-divrs 0.3 --lambda-max-divrs 0.1".split()


@pytest.fixture
def quiet():
    set_quiet(True)
    yield
    set_quiet(False)


def test_quiet_leaves_results_alone(resnet, tmp_path, capsys, quiet):
    quantize(resnet, tmp_path, *ONE_PAIR)
    header, _, row, *_, plots, best = capsys.readouterr().out.strip().splitlines()
    assert header.split()[:3] == ["s", "g", "accuracy"] and row.split()[:2] == ["0.3", "0.1"]
    assert plots.startswith("Plots") and best.startswith("Best by accuracy")


class Writer:
    """In TensorBoard's place."""

    def __init__(self, folder: str, purge_step: int):
        self.first, self.scalars = purge_step, []
        Writer.made.append(self)

    made: ClassVar[list["Writer"]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_tensorboard_shows_the_log(resnet, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr("engine.store.events.find_spec", lambda name: ModuleType(name))
    quantize(resnet, tmp_path, *ONE_PAIR, "--tensorboard")
    (run,) = runs(tmp_path)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (writer,) = Writer.made
    assert writer.first == 0
    accuracies = [(value, step) for name, value, step in writer.scalars if name == "accuracy"]
    assert accuracies == [(record["accuracy"], step) for step, record in enumerate(log)]
    centroids = {value for name, value, step in writer.scalars if "/centroids/" in name and step == 1}
    assert centroids == {value for facts in log[1]["layers"].values() for value in facts["centroids"]}


def test_tensorboard_is_asked_for(resnet, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.store.events.find_spec", lambda name: None)
    assert "pip install tensorboard" in refusal(quantize, resnet, tmp_path, *ONE_PAIR, "--tensorboard")
