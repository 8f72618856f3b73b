"""Training one network from scratch: SGD with Nesterov momentum, the best epoch kept."""

import warnings
from argparse import Namespace

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from engine.checkpoint import expecting, network_content, save
from engine.data import Data
from engine.device import Machine
from engine.evaluation import evaluate
from engine.report import say
from engine.restore import restore_network, restore_optimizer
from engine.runs import Run
from engine.training import Diverged, derived_seed, train_epoch

RECORD = {"epoch": int, "lr": float, "train_loss": float, "val_loss": float, "accuracy": float}  # of an epoch


def schedule(optimizer: torch.optim.Optimizer, data: Data, epochs: int) -> LRScheduler:
    """Learning rate over the epochs: cosine annealing to 0; for ImageNet steps at 30, 60, 90 by 0.1."""
    if data.name == "ImageNet":
        return MultiStepLR(optimizer, milestones=[30, 60, 90], gamma=0.1)
    return CosineAnnealingLR(optimizer, T_max=epochs)


def train(network: nn.Module, spec: dict, data: Data, machine: Machine, args: Namespace, run: Run) -> dict:
    """Train `network` and return the best epoch's record; `best.pt` in the run's folder holds that epoch's network.

    Continues from `run.state` where there is one. A loss that becomes NaN ends the training; the record then
    has the key `diverged`, and the best network up to there stays.
    """
    network = machine.place(network)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        nesterov=args.momentum > 0,
        fused=True,
    )
    first, best = args.start_epoch, {"epoch": None, "accuracy": 0.0}
    if run.state:
        with expecting(run.last, "the state of this run"):
            restore_network(network, run.state["network"])
            restore_optimizer(optimizer, run.state["optimizer"])
            run.check(RECORD, "best.pt")
            first, best = min(max(0, run.history[-1]["epoch"]), args.epochs), run.best
        say(f"  continuing after epoch {first}")

    scheduler = schedule(optimizer, data, args.epochs)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a schedule ahead of its optimizer
        for _ in range(first):
            scheduler.step()
    runner = machine.runner(network)
    for epoch in range(first, args.epochs):
        lr = scheduler.get_last_lr()[0]
        try:
            loss = train_epoch(
                runner, optimizer, data, machine, derived_seed(args.seed, epoch), f"epoch {epoch + 1}/{args.epochs}"
            )
            validation = evaluate(network, data, machine)
        except Diverged as error:
            say(f"  stopped: {error}; try a smaller --lr than {args.lr:g}")
            return {**best, "diverged": str(error)}
        scheduler.step()
        record = {
            "epoch": epoch + 1,
            "lr": lr,
            "train_loss": loss,
            "val_loss": validation.loss,
            "accuracy": validation.accuracy,
        }
        if best["epoch"] is None or validation.accuracy > best["accuracy"]:
            best = record
            extra = {"dataset": data.name, "image_size": data.image_size, "accuracy": validation.accuracy}
            save(network_content(spec, network, **extra), run.folder / "best.pt")
        run.save_epoch(record, {"network": network.state_dict(), "optimizer": optimizer.state_dict()})
        say(
            f"  epoch {epoch + 1:3d}/{args.epochs}  lr {lr:.4f}  train loss {loss:.4f}  "
            f"val loss {validation.loss:.4f}  accuracy {validation.accuracy:5.2f}%  best {best['accuracy']:5.2f}%"
        )
    return best
