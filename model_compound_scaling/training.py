"""Training one grid point from scratch: SGD with Nesterov momentum."""

from dataclasses import dataclass

import torch
from torch import nn

from engine.device import Machine
from engine.evaluation import evaluate
from engine.fit import Phase
from engine.images.batches import Data
from engine.images.datasets import DATASETS
from engine.objective import Objective, Taught
from engine.store.checkpoint import Content, network_content
from engine.store.run_folder import Record
from engine.training import Epoch, Trained, cosine, derived_seed, load_moments, train_epoch
from model import Spec


@dataclass(frozen=True)
class Recipe(Taught):
    """All that shapes the result of a grid point (d, w), or of the network `model`: its run's folder is found by it.

    `data` is the digest of the images, `init_sha256` that of the file `init`; `image_size` is in pixels; the others are
    the flags of these names. What has a default was added later; see `engine.store.run_folder.shaping`.
    """

    dataset: str
    data: str
    image_size: int
    d: float | None
    w: float | None
    phi: float | None
    epochs: int
    start_epoch: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    seed: int
    amp: str
    compile: bool
    model: str | None = None
    model_args: tuple[tuple[str, object], ...] = ()
    init: str | None = None
    init_sha256: str | None = None


class Scratch:
    """`network`, which `spec` describes, in training; a learner as `engine.fit` has it."""

    def __init__(
        self, network: nn.Module, spec: Spec, data: Data, machine: Machine, recipe: Recipe, objective: Objective
    ):
        self.spec, self.data, self.machine, self.recipe = spec, data, machine, recipe
        self.objective = objective
        self.network = machine.place(network)
        self.runner = machine.runner(self.network)
        self.amp = machine.amp
        self.initial_lr = self.lr = recipe.lr
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.momentum > 0,
            fused=True,
        )

    @property
    def phases(self) -> list[Phase]:
        return [Phase("", self.recipe.epochs, first=self.recipe.start_epoch)]

    def begin(self, phase: Phase, best: Content | None) -> None:
        """There is one phase, and nothing to get ready."""

    def train_epoch(self, phase: Phase, epoch: int) -> Trained:
        self.lr = self.initial_lr * learning_rate_factor(self.data.name, epoch, phase.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        epoch_of_run = Epoch(derived_seed(self.recipe.seed, epoch), f"epoch {epoch + 1}/{phase.epochs}")
        return train_epoch(self.runner, self.optimizer, self.data, self.machine, epoch_of_run, self.objective)

    def evaluate(self) -> dict[str, float]:
        validation = evaluate(self.network, self.data, self.machine.in_32_bit())
        return {"val_loss": validation.loss, "accuracy": validation.accuracy}

    def line(self, phase: Phase, record: Record, best: Record) -> str:
        return (
            f"  epoch {record['epoch']:3d}/{phase.epochs}  lr {record['lr']:.4f}  "
            f"train {record['train_loss']:.3f} {record['train_accuracy']:5.2f}%  "
            f"val {record['val_loss']:.3f} {record['accuracy']:5.2f}%  best {best['accuracy']:5.2f}%"
        )

    def best_network(self, record: Record) -> Content:
        told = {"dataset": self.data.name, "classes": self.data.classes, "image_size": self.data.image_size}
        return network_content(self.spec, self.network, **told, accuracy=record["accuracy"])

    def state_dict(self) -> Content:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Content) -> None:
        self.network.load_state_dict(state["network"])
        load_moments(self.optimizer, state["optimizer"])


def learning_rate_factor(dataset: str, epoch: int, epochs: int) -> float:
    """The factor of the learning rate in `epoch`, counted from 0: a half cosine; for ImageNet steps by 0.1."""
    if steps := DATASETS[dataset].learning_rate_steps:
        return 0.1 ** sum(epoch >= step for step in steps)
    return cosine(epoch, epochs)
