"""One pair (s, g) of the sweep: ternarize, then retrain with the assignment frozen."""

from dataclasses import dataclass

import torch
from torch import nn

from engine.device import Machine
from engine.evaluation import evaluate
from engine.fit import Phase
from engine.images.batches import Data
from engine.objective import Objective, Taught
from engine.store.checkpoint import Checkpoint, Content, network_content
from engine.store.run_folder import Record
from engine.training import Epoch, Trained, cosine, derived_seed, train_epoch
from model.selection import Patterns
from model_quantization.choosing import Layers
from model_quantization.optimizer import EC2TOptimizer
from model_quantization.quantized_layers import QuantizedLayers

RETRAIN = "retrain"  # name of the second phase


@dataclass(frozen=True)
class Recipe(Taught):
    """All that shapes the result of a pair (s, g), and nothing else: its run's folder is found by it.

    `model_dict` and `sha256` are name and digest of the checkpoint, `data` is the digest of the images; `image_size`
    is in pixels; `strengths` are the g of patterns of layers; the others are the flags of these names. What has a
    default was added later; see `engine.store.run_folder.shaping`.
    """

    model_dict: str
    sha256: str
    dataset: str
    data: str
    image_size: int
    s: float | str
    g: float
    epochs: int
    retrain_epochs: int
    batch_size: int
    lr: float
    lr2: float
    schedule: str
    weight_decay: float
    lambda_sustain: float
    do_prune: bool
    seed: int
    amp: str
    compile: bool
    layers: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    bits: tuple[tuple[str, int], ...] = ()
    strengths: tuple[tuple[str, float], ...] = ()
    keep_zeros: bool = False
    retrain_only: bool = False

    @property
    def patterns(self) -> Patterns:
        return Patterns(self.layers, self.without, self.bits, self.strengths)

    @property
    def phases(self) -> list[Phase]:
        if self.retrain_only:
            return [Phase(RETRAIN, self.retrain_epochs, evaluate_first=True)]
        first = Phase("prune" if self.do_prune else "ternarize", self.epochs, evaluate_first=True)
        return [first, Phase(RETRAIN, self.retrain_epochs)]


class Quantization:
    """The network of a checkpoint with its `layers` under EC2T, or under entropy-constrained pruning.

    A learner as `engine.fit` has it.
    """

    def __init__(
        self, checkpoint: Checkpoint, layers: Layers, data: Data, machine: Machine, recipe: Recipe, objective: Objective
    ):
        self.spec, self.data, self.machine, self.recipe = checkpoint.spec, data, machine, recipe
        self.objective, names = objective, layers.chosen
        self.network = machine.place(checkpoint.network())
        parameters = dict(self.network.named_parameters())
        for name in layers.fixed:
            parameters.pop(name).requires_grad_(False)
        strengths = layers.strengths(recipe.g)
        self.layers = QuantizedLayers(self.network, names, recipe.s, strengths, recipe.lambda_sustain, recipe.do_prune)
        self.layers.keep_zeros = recipe.keep_zeros
        if machine.compile:
            self.layers.compile()
        self.others = [p for name, p in parameters.items() if name not in names and p.requires_grad]
        self.runner = machine.runner(self.network)
        self.amp, self.initial_lr = machine.amp, recipe.lr
        self.optimizer: EC2TOptimizer

    @property
    def lr(self) -> float:
        return self.optimizer.lr

    def begin(self, phase: Phase, best: Content | None) -> None:
        if best is not None:
            self.network.load_state_dict(best["state_dict"])
            self.layers.load_state_dict(best["layers"])
        self.layers.frozen = phase.name == RETRAIN
        recipe = self.recipe
        self.optimizer = EC2TOptimizer(self.layers, self.others, recipe.lr, recipe.lr2, recipe.weight_decay)

    def train_epoch(self, phase: Phase, epoch: int) -> Trained:
        if self.recipe.schedule == "cosine":
            self.optimizer.scale_learning_rates(cosine(epoch, phase.epochs))
        seed = derived_seed(self.recipe.seed, 2 if phase.name == RETRAIN else 1, epoch)
        epoch_of_run = Epoch(seed, f"{phase.name} {epoch + 1}/{phase.epochs}")
        return train_epoch(self.runner, self.optimizer, self.data, self.machine, epoch_of_run, self.objective)

    def evaluate(self) -> Record:
        validation = evaluate(self.network, self.data, self.machine.in_32_bit())
        return {
            "val_loss": validation.loss,
            "accuracy": validation.accuracy,
            "zeros": zeros_percent(self.network),
            "entropy": self.layers.entropy(),
            "layers": self.layers.facts(),
        }

    def line(self, phase: Phase, record: Record, best: Record) -> str:
        trained = f"{'-':>12}"
        if record["train_loss"] is not None:
            trained = f"{record['train_loss']:.3f} {record['train_accuracy']:5.2f}%"
        return (
            f"  {phase.name:<9} {record['epoch']:3d}  train {trained}  val {record['val_loss']:.3f} "
            f"{record['accuracy']:5.2f}%  best {best['accuracy']:5.2f}%  "
            f"zeros {zeros_of_layers(record['layers']):.1f}/{record['zeros']:.1f}%  {record['entropy']:.3f} bit"
        )

    def best_network(self, record: Record) -> Content:
        content = network_content(
            self.spec,
            self.network,
            dataset=self.data.name,
            classes=self.data.classes,
            image_size=self.data.image_size,
            val_image_size=self.data.val_image_size,
            accuracy=record["accuracy"],
            **self.layers.by_layer(),
        )
        return content | {"layers": self.layers.state_dict()}

    def state_dict(self) -> Content:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Content) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.network.load_state_dict(state["network"])


def zeros_percent(network: nn.Module) -> float:
    """Share of a network's parameters that are zero, in percent."""
    parameters = list(network.parameters())
    zeros = torch.stack([(p == 0).sum() for p in parameters]).sum().item()
    return 100 * zeros / sum(p.numel() for p in parameters)


def zeros_of_layers(layers: Record) -> float:
    """Share of the quantized layers' weights that are zero, in percent, from `QuantizedLayers.facts`."""
    clusters = [facts["clusters"] for facts in layers.values()]
    return 100 * sum(zero for _, zero, _ in clusters) / sum(map(sum, clusters))
