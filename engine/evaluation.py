"""How often a network is right."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import distributed
from engine.device import Machine
from engine.images.batches import Data
from engine.program.report import progress, say
from engine.store.checkpoint import read_network
from engine.store.values import stored_values


class Diverged(Exception):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy (nats) and correct answers over `images` images."""

    loss: float
    correct: int
    images: int

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct / self.images


def dense_flop(network: nn.Module, image_size: int) -> int:
    """FLOP of one RGB image of `image_size` px: 2 a multiply-accumulate, zero weights too; leaves evaluation mode."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    image = torch.zeros(1, 3, image_size, image_size, device=device)
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton: no earlier than it is needed

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(image)
    return counter.get_total_flops()


@torch.no_grad()
def as_stored(network: nn.Module, half_precision: bool = True) -> nn.Module:
    """A copy of `network` on the CPU with the values that its packed file has, parameters and buffers."""
    network = copy.deepcopy(network).cpu()
    for tensor in network.state_dict().values():
        kept = stored_values(tensor, half_precision) if isinstance(tensor, Tensor) else tensor  # extra state: anything
        if kept is not tensor:
            tensor.copy_(kept)
    return network


def say_test(path: Path, data: Data, machine: Machine) -> None:
    """Say a checkpoint's accuracy on the test images, if a part of the training images was held out for choosing."""
    if data.for_test:
        evaluation = evaluate(machine.place(read_network(path).network()), data.for_test, machine.in_32_bit())
        say(f"{evaluation.accuracy:.2f}% of {evaluation.images:,} test images, on which nothing was chosen")


@torch.no_grad()
def evaluate(network: nn.Module, data: Data, machine: Machine) -> Evaluation:
    """Evaluate `network`, in evaluation mode, on every validation image once; processes share them.

    Raises Diverged if the loss is NaN or infinite.
    """
    network.eval()
    loss = torch.zeros((), dtype=torch.float64, device=machine.device)
    correct = torch.zeros((), dtype=torch.int64, device=machine.device)
    for images, labels in progress(data.val_batches(), "validation", data.num_val_batches):
        with machine.autocast():
            logits = network(images)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    loss, correct = map(distributed.all_reduce, (loss, correct))
    mean = loss.item() / data.num_val_images
    if not math.isfinite(mean):
        raise Diverged(f"the validation loss became {mean}")
    return Evaluation(mean, int(correct.item()), data.num_val_images)
