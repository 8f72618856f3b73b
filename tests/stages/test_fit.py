"""The epoch loop, on a learner whose epochs are numbers: what is best, what is written when, what is continued."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from engine.evaluation import Diverged
from engine.fit import Phase, fit
from engine.program.errors import UserError
from engine.store import files
from engine.store.checkpoint import read
from engine.store.run_folder import Run
from engine.training import Trained

PHASES = [Phase("first", 3, evaluate_first=True), Phase("second", 2)]
ACCURACIES = [50.0, 60.0, 70.0, 65.0, 64.0, 72.0]  # before training, of three epochs, and of two more


@dataclass
class Numbers:
    """Its state is the number of epochs trained; the next of `accuracies` is each evaluation's."""

    accuracies: list[float]
    losses: list[float] = field(default_factory=list)
    initial_lr: float = 0.5
    lr: float = 0.25
    amp: str = "off"
    seen: int = 0
    began: list[tuple[str, int | None]] = field(default_factory=list)

    def begin(self, phase, best):
        self.began.append((phase.name, best and int(best["seen"])))

    def train_epoch(self, phase, epoch):
        return Trained(1.0, 50.0)

    def evaluate(self):
        accuracy = self.accuracies[self.seen]
        if accuracy < 0:
            raise Diverged("the loss became nan")
        loss = self.losses[self.seen] if self.losses else 1.0
        self.seen += 1
        return {"val_loss": loss, "accuracy": accuracy}

    def line(self, phase, record, best):
        return f"{phase.name} {record['epoch']}: {record['accuracy']}, best {best['accuracy']}"

    def best_network(self, record):
        return {"seen": torch.tensor(self.seen), "accuracy": record["accuracy"]}

    def state_dict(self):
        return {"seen": torch.tensor(self.seen)}

    def load_state_dict(self, state):
        self.seen = int(state["seen"])


def opened(folder: Path) -> Run:
    run = Run(folder, "x", {"lr": 0.5})
    run.open(resume=True)
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ("seconds", "lock")}


def test_phases_begin_with_the_best_network_of_the_one_before(tmp_path, capsys):
    learner, run = Numbers(ACCURACIES), opened(tmp_path)
    best = fit(learner, PHASES, run)
    assert best == {
        "phase": "second",
        "epoch": 2,
        "lr": 0.25,
        "amp": "off",
        "train_loss": 1.0,
        "train_accuracy": 50.0,
        "val_loss": 1.0,
        "accuracy": 72.0,
    }
    assert learner.began == [("first", None), ("second", 3)]  # the second epoch's network was the third evaluated
    assert read(run.folder / "best_first.pt")["accuracy"] == 70.0
    assert read(run.folder / "best_second.pt")["accuracy"] == 72.0
    assert [(r["phase"], r["epoch"]) for r in run.log] == [
        *(("first", epoch) for epoch in range(4)),
        *(("second", epoch) for epoch in (1, 2)),
    ]
    assert [r["train_loss"] for r in run.log] == [None, *[1.0] * 5]
    assert capsys.readouterr().out.splitlines()[-1] == "second 2: 72.0, best 72.0  0 s"


def test_a_run_of_one_phase_without_a_name(tmp_path):
    run = opened(tmp_path)
    best = fit(Numbers([50.0, 40.0]), [Phase("", 4, first=2)], run)
    assert best["epoch"] == 3 and "phase" not in best and [r["epoch"] for r in run.log] == [3, 4]
    assert read(run.folder / "best.pt")["accuracy"] == 50.0


@pytest.mark.parametrize(("accuracies", "losses", "best"), [((5, 6, 6), (1, 3, 2), 3), ((6, 6, 5), (1, 1, 0), 1)])
def test_among_equally_accurate_epochs_the_smallest_loss_is_best(accuracies, losses, best, tmp_path):
    learner = Numbers(list(map(float, accuracies)), list(map(float, losses)))
    assert fit(learner, [Phase("", 3)], opened(tmp_path))["epoch"] == best


def test_the_order_of_writes(tmp_path, monkeypatch):
    written, original = [], files.write_whole

    def write_whole(data, path):
        written.append(path.name)
        original(data, path)

    run = opened(tmp_path)
    for module in ("engine.store.files", "engine.store.checkpoint"):
        monkeypatch.setattr(f"{module}.write_whole", write_whole)
    fit(Numbers([50.0, 40.0]), [Phase("", 2)], run)
    assert written == ["last.pt", "log.jsonl", "seconds", "best.pt", "last.pt", "log.jsonl", "seconds"]


@pytest.mark.parametrize("writes", range(22))
def test_killed_before_any_write_it_ends_in_the_same_bytes(writes, tmp_path, monkeypatch):
    """There are four writes in an epoch that is the best so far, and three in another."""
    fit(Numbers(ACCURACIES), PHASES, whole := opened(tmp_path / "whole"))
    done, original = [], files.write_whole

    def write_whole(data, path):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(path)
        original(data, path)

    run = opened(tmp_path / "killed")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for module in ("engine.store.files", "engine.store.checkpoint"):
            patch.setattr(f"{module}.write_whole", write_whole)
        fit(Numbers(ACCURACIES), PHASES, run)
    run._lock.close()
    fit(Numbers(ACCURACIES), PHASES, opened(tmp_path / "killed"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") != {}
    assert whole.log == run.log


def test_divergence_keeps_the_best_epoch(tmp_path, capsys):
    best = fit(Numbers([50.0, 60.0, -1.0]), PHASES, opened(tmp_path))
    assert best["accuracy"] == 60.0 and best["diverged"] == "the loss became nan"
    assert capsys.readouterr().out.splitlines()[-1] == "  stopped: the loss became nan; try a smaller --lr than 0.5"


def test_divergence_in_the_first_epoch_leaves_no_epoch(tmp_path):
    best = fit(Numbers([-1.0]), [Phase("", 2)], opened(tmp_path))
    assert best == {"epoch": None, "accuracy": 0.0, "diverged": "the loss became nan"}


def test_a_network_that_is_broken_before_training_is_no_divergence(tmp_path):
    with pytest.raises(Diverged):
        fit(Numbers([-1.0]), PHASES, opened(tmp_path))


@pytest.mark.parametrize("damage", ["phase", "best"])
def test_a_state_that_does_not_fit_names_the_way_out(damage, tmp_path):
    run = opened(tmp_path)
    fit(Numbers([50.0, 60.0, 55.0, 40.0]), PHASES[:1], run)
    run.finish({})
    if damage == "best":
        (run.folder / "best_first.pt").unlink()
    phases = PHASES[1:] if damage == "phase" else PHASES[:1]
    with pytest.raises(UserError, match=r"last\.pt: is not the state of this run .*; --no-resume starts the run"):
        fit(Numbers([50.0]), phases, opened(tmp_path))
