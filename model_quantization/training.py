"""One pair (s, g) of the sweep: ternarize, then retrain with the assignment frozen."""

from dataclasses import dataclass

from torch import nn

from engine.device import Machine
from engine.evaluation import evaluate
from engine.fit import Phase
from engine.images.batches import Data
from engine.program.errors import UserError
from engine.store.checkpoint import Checkpoint, network_content
from engine.training import cosine, derived_seed, train_epoch
from model.selection import is_ternary, pruning_candidates, ternary_candidates
from model_quantization.optimizer import EC2TOptimizer
from model_quantization.quantized_layers import TernaryLayers

RETRAIN = "retrain"  # name of the second phase


@dataclass(frozen=True)
class Recipe:
    """All that shapes the result of a pair (s, g), and nothing else: its run's folder is found by it.

    `model_dict` and `sha256` are name and digest of the checkpoint, `data` is the digest of the images; `image_size`
    is in pixels; the others are the flags of these names.
    """

    model_dict: str
    sha256: str
    dataset: str
    data: str
    image_size: int
    s: float
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

    @property
    def phases(self) -> list[Phase]:
        first = Phase("prune" if self.do_prune else "ternarize", self.epochs, evaluate_first=True)
        return [first, Phase(RETRAIN, self.retrain_epochs)]


class Quantization:
    """The network of a checkpoint under EC2T, or under entropy-constrained pruning; a learner as `engine.fit` has it.

    UserError where nothing is left to prune.
    """

    def __init__(self, checkpoint: Checkpoint, data: Data, machine: Machine, recipe: Recipe):
        self.spec, self.data, self.machine, self.recipe = checkpoint.spec, data, machine, recipe
        self.network = machine.place(checkpoint.network())
        choose = pruning_candidates if recipe.do_prune else ternary_candidates
        names = choose(self.network, self.spec["name"])
        if not names:
            raise UserError(f"{checkpoint.path}: all layers that --do-prune prunes are ternary; leave it out")
        parameters = dict(self.network.named_parameters())
        if recipe.do_prune:  # layers that are ternary already neither move nor decay
            for name in ternary_candidates(self.network, self.spec["name"]):
                if name not in names and is_ternary(parameters[name]):
                    parameters.pop(name).requires_grad_(False)
        self.layers = TernaryLayers(self.network, names, recipe.s, recipe.g, recipe.lambda_sustain, recipe.do_prune)
        if machine.compile:
            self.layers.compile()
        self.others = [parameter for name, parameter in parameters.items() if name not in names]
        self.runner = machine.runner(self.network)
        self.amp, self.initial_lr = machine.amp, recipe.lr
        self.optimizer: EC2TOptimizer

    @property
    def lr(self) -> float:
        return self.optimizer.lr

    def begin(self, phase: Phase, best: dict | None) -> None:
        if best is not None:
            self.network.load_state_dict(best["state_dict"])
            self.layers.load_state_dict(best["layers"])
        self.layers.frozen = phase.name == RETRAIN
        recipe = self.recipe
        self.optimizer = EC2TOptimizer(self.layers, self.others, recipe.lr, recipe.lr2, recipe.weight_decay)

    def train_epoch(self, phase: Phase, epoch: int) -> float:
        if self.recipe.schedule == "cosine":
            self.optimizer.scale_learning_rates(cosine(epoch, phase.epochs))
        seed = derived_seed(self.recipe.seed, 2 if phase.name == RETRAIN else 1, epoch)
        description = f"{phase.name} {epoch + 1}/{phase.epochs}"
        return train_epoch(self.runner, self.optimizer, self.data, self.machine, seed, description)

    def evaluate(self) -> dict[str, float]:
        validation = evaluate(self.network, self.data, self.machine.in_32_bit())
        return {
            "val_loss": validation.loss,
            "accuracy": validation.accuracy,
            "zeros": zeros_percent(self.network),
            "entropy": self.layers.entropy(),
        }

    def line(self, phase: Phase, record: dict, best: dict) -> str:
        loss = "   -  " if record["train_loss"] is None else f"{record['train_loss']:.4f}"
        return (
            f"  {phase.name:<9} {record['epoch']:3d}  train loss {loss}  val loss {record['val_loss']:.4f}  "
            f"accuracy {record['accuracy']:6.2f}%  zeros {record['zeros']:5.2f}%  "
            f"entropy {record['entropy']:.3f} bit  best {best['accuracy']:6.2f}%"
        )

    def best_network(self, record: dict) -> dict:
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

    def state_dict(self) -> dict:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.network.load_state_dict(state["network"])


def zeros_percent(network: nn.Module) -> float:
    """Share of a network's parameters that are zero, in percent."""
    parameters = list(network.parameters())
    return 100 * sum((p == 0).sum() for p in parameters).item() / sum(p.numel() for p in parameters)
