"""Training over epochs, once for every stage: the best one kept, every whole one saved, continued where it stopped.

A stage hands over a learner, which knows how one epoch is trained and evaluated; files are met here alone. After every
epoch they are written in this order:

    last.pt         first: it decides. All that follows can be made again from it
    log.jsonl, seconds
    best*.pt        if this epoch is the best so far

A process may be killed between any two of these writes; the next one continues after the epoch that `last.pt` holds.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine import distributed
from engine.evaluation import Diverged
from engine.program.report import duration, narrate, say
from engine.store.checkpoint import Content, expecting, read, save
from engine.store.run_folder import Record, Run
from engine.training import Trained


@dataclass(frozen=True)
class Phase:
    """Some epochs of training, with a best network of their own.

    Attributes:
        name: as the log has it; "" where a run has one phase only.
        epochs: at which training ends.
        first: epochs that count as trained before.
        evaluate_first: note the network as it is before any training, too, as an epoch 0.
    """

    name: str
    epochs: int
    first: int = 0
    evaluate_first: bool = False

    @property
    def best_file(self) -> str:
        return f"best_{self.name}.pt" if self.name else "best.pt"


class Learner(Protocol):
    """A network in training, as `fit` needs it.

    Attributes:
        initial_lr: what a user whose training diverged should lower.
        lr: the learning rate of the last epoch, and
        amp: its arithmetic; both are noted.
    """

    initial_lr: float
    amp: str

    @property
    def lr(self) -> float: ...

    def begin(self, phase: Phase, best: Content | None) -> None:
        """Get ready for a phase; `best` is what `best_network` gave in the phase before, None in the first one."""

    def train_epoch(self, phase: Phase, epoch: int) -> Trained:
        """Train epoch `epoch`, counted from 0; or raise Diverged."""

    def evaluate(self) -> Record:
        """What is noted of an epoch: `val_loss`, `accuracy` (percent) and what else matters; or raise Diverged."""

    def line(self, phase: Phase, record: Record, best: Record) -> str:
        """What the console shows of an epoch."""

    def best_network(self, record: Record) -> Content:
        """The checkpoint of the network as it is now, which is that of the best epoch."""

    def state_dict(self) -> Content:
        """All that training changes."""

    def load_state_dict(self, state: Content) -> None:
        """Take over a `state_dict`; LookupError, TypeError, ValueError or RuntimeError where it does not fit."""


def merit(record: Record) -> tuple[float, float]:
    """What makes an epoch the best one: its accuracy, and among equals the smallest validation loss."""
    return record["accuracy"], -record["val_loss"]


def fit(learner: Learner, phases: Sequence[Phase], run: Run) -> Record:
    """Train through `phases`, from where an earlier process stopped; return the record of the best epoch of all.

    A loss that becomes NaN ends the training, and the record then has the key `diverged`; without any epoch it is
    `{"epoch": None, "accuracy": 0.0}`. Raises Diverged where the loss of the network is NaN before any training.
    """
    best: Record | None = None
    began = time.monotonic()

    def note(phase: Phase, epoch: int, done: Trained | None) -> None:
        nonlocal best, began
        named = {"phase": phase.name} if phase.name else {}
        training = {"train_loss": done and done.loss, "train_accuracy": done and done.accuracy}
        record = named | {"epoch": epoch, "lr": learner.lr, "amp": learner.amp} | training
        record |= learner.evaluate()
        run.save_epoch(record, learner.state_dict())
        if best is None or merit(record) > merit(best):
            best = record
            save(learner.best_network(best), run.folder / phase.best_file)
        narrate(f"{learner.line(phase, record, best)}  {duration(time.monotonic() - began)}")
        began = time.monotonic()

    begun, trained = 0, phases[0].first
    if run.state:
        with expecting(run.last, "the state of this run"):
            begun, trained, best = _continue(learner, phases, run)
    else:
        learner.begin(phases[0], None)
        if phases[0].evaluate_first:
            note(phases[0], 0, None)
    try:
        for i, phase in enumerate(phases[begun:], begun):
            if i > begun:
                _begin_with_best(learner, phase, phases[i - 1], run)
                trained = phase.first
            for epoch in range(trained, phase.epochs):
                note(phase, epoch + 1, learner.train_epoch(phase, epoch))
    except Diverged as error:
        say(f"  stopped: {error}; try a smaller --lr than {learner.initial_lr:g}")
        return {**(best or {"epoch": None, "accuracy": 0.0}), "diverged": str(error)}
    assert best is not None  # every run has an epoch, or is evaluated first
    return best


def _continue(learner: Learner, phases: Sequence[Phase], run: Run) -> tuple[int, int, Record]:
    """Restore the learner. Return which phase goes on, after which epoch, and the record of the best epoch so far."""
    last, best = run.history[-1], max(run.history, key=merit)
    names = [phase.name for phase in phases]
    at = names.index(last.get("phase", ""))
    best_file = phases[names.index(best.get("phase", ""))].best_file
    learner.begin(phases[at], None)
    assert run.state is not None
    learner.load_state_dict(run.state)
    if best is last:  # the process may have ended before it saved that network
        save(learner.best_network(best), run.folder / best_file)
    elif not (run.folder / best_file).is_file():
        raise ValueError(f"{best_file} beside it is missing")
    of_phase = f" of phase {phases[at].name!r}" if phases[at].name else ""
    narrate(f"  continuing after epoch {last['epoch']}{of_phase}")
    return at, last["epoch"], best


def _begin_with_best(learner: Learner, phase: Phase, before: Phase, run: Run) -> None:
    """Begin `phase` with the best network of the phase before it."""
    distributed.barrier()  # until the first process has written it
    path = run.folder / before.best_file
    content = read(path)
    with expecting(path, "the best network of this run"):
        learner.begin(phase, content)
