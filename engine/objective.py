"""What training minimises: cross-entropy, or with a teacher a part of it and the distance to what the teacher says."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.device import Machine
from engine.images.augment import Mixed
from engine.images.batches import Data
from engine.program.errors import UserError
from engine.store.checkpoint import Checkpoint, find, read_network
from model.own import is_own

SELF = "self"  # the teacher that is the network itself before training


@dataclass(frozen=True)
class Objective:
    """(1 - weight) * cross-entropy + weight * T^2 * KL(teacher || network), both at temperature T.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.

    Attributes:
        teacher: gives logits `[N, classes]` for images; None leaves the cross-entropy alone.
        weight: of the distance, from 0 to 1.
        temperature: by which both networks' logits are divided.
        freeze_batch_norm: whether BatchNorm keeps its running statistics, and normalises by them.
        cutmix: the probability that CutMix mixes a batch; a teacher sees the same images.
    """

    teacher: Callable[[Tensor], Tensor] | None = None
    weight: float = 1.0
    temperature: float = 1.0
    freeze_batch_norm: bool = False
    cutmix: float = 0.0

    def start(self, network: nn.Module) -> None:
        """Put `network` in training mode."""
        network.train()
        if self.freeze_batch_norm:
            for module in network.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def loss(self, logits: Tensor, batch: Mixed) -> Tensor:
        """The mean loss of a batch (nats), of logits `[N, classes]`; UserError where a network returns others."""
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise UserError(
                f"in training, the network returns a {type(logits).__name__}, not logits [N, classes]; "
                f"pass --model-args that leave other outputs out, such as aux_logits=False"
            )
        if self.teacher is None:
            return _cross_entropy(logits, batch)
        with torch.no_grad():
            wanted = self.teacher(batch.images)
        distance = self.temperature**2 * F.kl_div(
            F.log_softmax(logits.float() / self.temperature, 1),
            F.log_softmax(wanted.float() / self.temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        if self.weight == 1:
            return distance
        return (1 - self.weight) * _cross_entropy(logits, batch) + self.weight * distance


def _cross_entropy(logits: Tensor, batch: Mixed) -> Tensor:
    loss = F.cross_entropy(logits, batch.labels)
    if batch.others is None or batch.share is None:
        return loss
    return torch.lerp(loss, F.cross_entropy(logits, batch.others), batch.share.to(loss.dtype))


@dataclass(frozen=True, kw_only=True)
class Taught:
    """The part of a recipe that says what training minimises, on images augmented how, and on which it is judged.

    `teacher_sha256` is that of the teacher's file; the others are the flags of these names. All have defaults, as they
    were added later; see `engine.store.run_folder.shaping`.
    """

    holdout: float = 0.0
    teacher: str | None = None
    teacher_sha256: str | None = None
    teacher_weight: float = 1.0
    temperature: float = 1.0
    freeze_batch_norm: bool = False
    augment_as: str = "published"
    cutmix: float = 0.0


def taught(args: Namespace, teacher: Checkpoint | None) -> dict[str, Any]:
    """The fields of `Taught` by name; UserError for flags of a teacher where there is none."""
    names = [field.name for field in fields(Taught) if field.name != "teacher_sha256"]
    values = {name: getattr(args, name) for name in names}
    if not teacher and (args.teacher_weight, args.temperature) != (1.0, 1.0):
        raise UserError(
            "--teacher-weight and --temperature say how a teacher is followed; pass --teacher NAME, or self"
        )
    return values | ({"teacher_sha256": teacher.sha256} if teacher else {})


def objective_of(recipe: Taught, teacher: Checkpoint | None, machine: Machine) -> Objective:
    """What training by `recipe` minimises."""
    answers = taught_by(teacher, machine) if teacher else None
    return Objective(answers, recipe.teacher_weight, recipe.temperature, recipe.freeze_batch_norm, recipe.cutmix)


def teacher_checkpoint(
    name: str | None, builder: str | None, own: Checkpoint | None, folder: Path, data: Data
) -> Checkpoint | None:
    """The network that teaches `own`: itself for "self", else of the file `name`, a path or a name in `folder`.

    `builder` is that of a teacher whose file does not name it; None if it is that of `own`, or a built-in network's.
    UserError where it has other classes than `data`.
    """
    if name is None:
        return None
    teacher = own if name == SELF else _read(find(name, folder), builder, own)
    assert teacher  # there is one where "self" is to teach
    teacher = teacher.run_at(data.image_size)
    teacher.check_classes(data.classes, data.name, "the data")
    return teacher


def _read(path: Path, builder: str | None, own: Checkpoint | None) -> Checkpoint:
    try:
        return read_network(path, {"name": builder} if builder else {})
    except UserError:
        if builder or not own or not is_own(own.spec["name"]):
            raise
        return read_network(path, {key: own.spec[key] for key in ("name", "arguments") if key in own.spec})


def taught_by(checkpoint: Checkpoint, machine: Machine) -> Callable[[Tensor], Tensor]:
    """What gives the logits of a checkpoint's network, in the arithmetic of the pass in which it is asked."""
    network = machine.place(checkpoint.network()).eval()

    def logits(images: Tensor) -> Tensor:
        with torch.inference_mode():
            answer = network(images)
        return answer.clone()  # a tensor that training may keep

    return logits
