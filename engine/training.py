"""One epoch of training, the same for every stage."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine import distributed
from engine.cuda_graph import Replayed
from engine.device import Machine
from engine.evaluation import Diverged
from engine.images.augment import cutmix
from engine.images.batches import Data
from engine.objective import Objective
from engine.program import processes
from engine.program.report import progress

STEPS_BETWEEN_LOOKS = 50  # steps between two looks at the loss: each look waits for the device


class Epoch(NamedTuple):
    """The seed of all that is random in an epoch, and what the progress bar calls it."""

    seed: int
    description: str


class Trained(NamedTuple):
    """The mean loss (nats) over an epoch, and the accuracy in percent, both while training and of augmented images.

    Of a mixed image its own label counts as right, however small its share.
    """

    loss: float
    accuracy: float


class Stepper(Protocol):
    """What an epoch, and float16's gradient scaler, need of an optimizer."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None: ...

    def step(self) -> object: ...


def derived_seed(seed: int, *position: int) -> int:
    """A seed for one position of a run (grid point, phase, epoch): independent streams from one `--seed`.

    All randomness of an epoch follows from it, so that a resumed run needs no saved random state.
    """
    return int(np.random.SeedSequence(seed, spawn_key=position).generate_state(1, np.uint64)[0] >> 1)


def cosine(epoch: int, epochs: int) -> float:
    """The factor of the learning rate in `epoch`, counted from 0: half a cosine from 1 to 0 (arXiv:1608.03983)."""
    return (1 + math.cos(math.pi * epoch / epochs)) / 2


def train_epoch(
    network: nn.Module, optimizer: Stepper, data: Data, machine: Machine, epoch: Epoch, objective: Objective
) -> Trained:
    """Train `network` on every image once; the loss is what `objective` measures.

    Raises Diverged as soon as a look at the loss finds it NaN or infinite, in all processes alike.
    """
    seed, description = epoch
    objective.start(network)
    torch.manual_seed(seed + processes.rank())
    scaler = machine.gradient_scaler()
    total = torch.zeros(2, device=machine.device)

    def train(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        batch = cutmix(images, labels, objective.cutmix)
        with machine.autocast():
            logits = network(batch.images)
            loss = objective.loss(logits, batch)
        scaler.scale(loss).backward()
        scaler.step(cast(Optimizer, optimizer))  # it needs no more than a Stepper has
        scaler.update()
        total.add_(torch.stack([loss.detach(), (logits.detach().argmax(1) == labels).float().mean()]))

    train_on = Replayed(train) if machine.graphs else train
    bar = progress(data.train_batches(seed), description, data.num_train_batches)
    for step, (images, labels) in enumerate(bar, start=1):
        train_on(images, labels)
        if step % STEPS_BETWEEN_LOOKS == 0 or step == data.num_train_batches:
            mean, right = distributed.all_reduce(total / (step * processes.world_size())).tolist()
            if not math.isfinite(mean):
                raise Diverged(f"the training loss became {mean} within {step} steps of {description}")
            bar.set_postfix(loss=f"{mean:.3f}")
    distributed.average_buffers(network)
    return Trained(mean, 100 * right)


def load_moments(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load the moments of an optimizer's `state_dict`; ValueError where they are of other parameters.

    Learning rates and the like stay as they are: they follow from a run's arguments.
    """
    optimizer.load_state_dict({**state_dict, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.ndim and moment.shape != parameter.shape:
                raise ValueError(f"{name} of the optimizer is {list(moment.shape)}, not {list(parameter.shape)}")
