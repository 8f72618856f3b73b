"""One point of the sweep: ternarize, then retrain with the assignment frozen."""

from argparse import Namespace
from pathlib import Path

from torch import nn

from engine.device import Machine
from engine.distributed import barrier
from engine.evaluation import Diverged, evaluate
from engine.images.batches import Data
from engine.program.errors import UserError
from engine.program.report import say
from engine.store.checkpoint import Checkpoint, expecting, network_content, read, save
from engine.store.restore import restore_network
from engine.store.run_folder import Run, merit
from engine.training import cosine, derived_seed, train_epoch
from model.selection import is_ternary, pruning_candidates, ternary_candidates
from model_quantization.optimizer import EC2TOptimizer
from model_quantization.quantized_layers import TernaryLayers

TERNARIZE, PRUNE, RETRAIN = "ternarize", "prune", "retrain"  # phases
RECORD = {  # of an epoch
    "phase": str,
    "epoch": int,
    "lr": float,
    "amp": str,
    "train_loss": float | None,
    "val_loss": float,
    "accuracy": float,
    "zeros": float,
    "entropy": float,
}


def zeros_percent(network: nn.Module) -> float:
    """Share of a network's parameters that are zero, in percent."""
    parameters = list(network.parameters())
    return 100 * sum((p == 0).sum() for p in parameters).item() / sum(p.numel() for p in parameters)


class Point:
    """Grid point (s, g): its network, its ternary layers, and the two phases of its training."""

    def __init__(
        self, checkpoint: Checkpoint, s: float, g: float, data: Data, machine: Machine, args: Namespace, run: Run
    ):
        self.spec, self.data, self.machine, self.args, self.run = checkpoint.spec, data, machine, args, run
        self.network = machine.place(checkpoint.network())
        choose = pruning_candidates if args.do_prune else ternary_candidates
        names = choose(self.network, self.spec["name"])
        if not names:
            raise UserError(f"{checkpoint.path}: all layers that --do-prune prunes are ternary; leave it out")
        parameters = dict(self.network.named_parameters())
        if args.do_prune:  # layers that are ternary already neither move nor decay
            for name in ternary_candidates(self.network, self.spec["name"]):
                if name not in names and is_ternary(parameters[name]):
                    parameters.pop(name).requires_grad_(False)
        self.layers = TernaryLayers(self.network, names, s, g, args.lambda_sustain, args.do_prune)
        if machine.compile:
            self.layers.compile()
        self.others = [parameter for name, parameter in parameters.items() if name not in names]
        self.runner = machine.runner(self.network)
        self.first_phase = PRUNE if args.do_prune else TERNARIZE
        self.best: dict | None = None

    def train(self) -> dict:
        """Run both phases, from where an earlier run stopped; return the record of the best epoch.

        A loss that becomes NaN ends the training; the record then has the key `diverged`.
        """
        phase, epoch = self.first_phase, 0
        try:
            if self.run.state:
                with expecting(self.run.last, "the state of this run"):
                    phase, epoch = self._progress()
                say(f"  continuing after epoch {epoch} of phase {phase!r}")
            self._train_phase(phase, epoch, self.run.state)
            if phase == self.first_phase:
                self._load_best()
                self._train_phase(RETRAIN, 0)
        except Diverged as error:
            if self.best is None:
                raise UserError(f"{error} before any training; take another --model-dict") from None
            say(f"  stopped: {error}; try a smaller --lr than {self.args.lr:g}")
            return {**self.best, "diverged": str(error)}
        return self.best

    def _progress(self) -> tuple[str, int]:
        """Phase and epoch of the last whole epoch of an earlier process."""
        self.run.check_history(RECORD)
        self.best, last = self.run.best, self.run.history[-1]
        if self.best is not last:  # else it follows from the state
            self.run.check_file(self.best_file(self.best["phase"]).name)
        if last["phase"] not in (self.first_phase, RETRAIN):
            raise ValueError(f"{last['phase']} is no phase of this run")
        return last["phase"], max(0, last["epoch"])

    def best_file(self, phase: str) -> Path:
        """The best network of a phase; separate files, so that a resumed run finds the first phase's."""
        return self.run.folder / f"best_{phase}.pt"

    def _train_phase(self, phase: str, first: int, state: dict | None = None) -> None:
        """Train from epoch `first` on, continuing from `state` where there is one."""
        epochs = self.args.retrain_epochs if phase == RETRAIN else self.args.epochs
        self.layers.frozen = phase == RETRAIN
        optimizer = EC2TOptimizer(self.layers, self.others, self.args.lr, self.args.lr2, self.args.weight_decay)
        if state:
            with expecting(self.run.last, "the state of this run"):
                optimizer.load_state_dict(state["optimizer"])
                restore_network(self.network, state["network"])
            if self.best is self.run.history[-1]:  # the process may have ended before it saved that network
                self._save_best()
        elif phase == self.first_phase:
            self._finish_epoch(phase, 0, None, optimizer)
        for epoch in range(first, epochs):
            if self.args.schedule == "cosine":
                optimizer.scale_learning_rates(cosine(epoch, epochs))
            seed = derived_seed(self.args.seed, 2 if phase == RETRAIN else 1, epoch)
            description = f"{phase} {epoch + 1}/{epochs}"
            loss = train_epoch(self.runner, optimizer, self.data, self.machine, seed, description)
            self._finish_epoch(phase, epoch + 1, loss, optimizer)

    def _finish_epoch(self, phase: str, epoch: int, loss: float | None, optimizer: EC2TOptimizer) -> None:
        """Evaluate; note the epoch; save what resuming needs, and the network if it is the best so far."""
        validation = evaluate(self.network, self.data, self.machine.in_32_bit())
        record = {
            "phase": phase,
            "epoch": epoch,
            "lr": optimizer.lr,
            "amp": self.machine.amp,
            "train_loss": loss,
            "val_loss": validation.loss,
            "accuracy": validation.accuracy,
            "zeros": zeros_percent(self.network),
            "entropy": self.layers.entropy(),
        }
        self.run.save_epoch(record, {"network": self.network.state_dict(), "optimizer": optimizer.state_dict()})
        if self.best is None or merit(record) > merit(self.best):
            self.best = record
            self._save_best()
        say(
            f"  {phase:<9} {epoch:3d}  train loss {'   -  ' if loss is None else f'{loss:.4f}'}  "
            f"val loss {validation.loss:.4f}  accuracy {validation.accuracy:6.2f}%  zeros {record['zeros']:5.2f}%  "
            f"entropy {record['entropy']:.3f} bit  best {self.best['accuracy']:6.2f}%"
        )

    def _save_best(self) -> None:
        """Save the network as it is now, which is the best one."""
        content = network_content(
            self.spec,
            self.network,
            dataset=self.data.name,
            classes=self.data.classes,
            image_size=self.data.image_size,
            val_image_size=self.data.val_image_size,
            accuracy=self.best["accuracy"],
            **self.layers.by_layer(),
        )
        save(content | {"layers": self.layers.state_dict()}, self.best_file(self.best["phase"]))

    def _load_best(self) -> None:
        """Load the best epoch's network, assignments and centroids of the first phase."""
        barrier()
        path = self.best_file(self.first_phase)
        content = read(path)
        with expecting(path, "the best network of this run"):
            restore_network(self.network, content["state_dict"])
            self.layers.load_state_dict(content["layers"])
