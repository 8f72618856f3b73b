"""Training one network from scratch: SGD with Nesterov momentum, the best epoch kept."""

from argparse import Namespace

import torch
from torch import nn

from engine.device import Machine
from engine.evaluation import Diverged, evaluate
from engine.images.batches import Data
from engine.program.report import say
from engine.store.checkpoint import expecting, network_content, save
from engine.store.restore import restore_network, restore_optimizer
from engine.store.run_folder import Run, merit
from engine.training import cosine, derived_seed, train_epoch

IMAGENET_STEPS = (30, 60, 90)  # epochs
RECORD = {  # of an epoch
    "epoch": int,
    "lr": float,
    "amp": str,
    "train_loss": float,
    "val_loss": float,
    "accuracy": float,
}


def learning_rate_factor(dataset: str, epoch: int, epochs: int) -> float:
    """The factor of the learning rate in `epoch`, counted from 0: a half cosine; for ImageNet steps by 0.1."""
    if dataset == "ImageNet":
        return 0.1 ** sum(epoch >= step for step in IMAGENET_STEPS)
    return cosine(epoch, epochs)


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

    def save_best() -> None:
        extra = {"dataset": data.name, "classes": data.classes, "image_size": data.image_size}
        extra |= {"accuracy": best["accuracy"]}
        save(network_content(spec, network, **extra), run.folder / "best.pt")

    first, best = args.start_epoch, {"epoch": None, "accuracy": 0.0}
    if run.state:
        with expecting(run.last, "the state of this run"):
            restore_network(network, run.state["network"])
            restore_optimizer(optimizer, run.state["optimizer"])
            run.check_history(RECORD)
            first, best = min(max(0, run.history[-1]["epoch"]), args.epochs), run.best
            if best is run.history[-1]:  # the process may have ended before it saved that network
                save_best()
            run.check_file("best.pt")
        say(f"  continuing after epoch {first}")

    runner = machine.runner(network)
    for epoch in range(first, args.epochs):
        lr = args.lr * learning_rate_factor(data.name, epoch, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        seed = derived_seed(args.seed, epoch)
        try:
            loss = train_epoch(runner, optimizer, data, machine, seed, f"epoch {epoch + 1}/{args.epochs}")
            validation = evaluate(network, data, machine.in_32_bit())
        except Diverged as error:
            say(f"  stopped: {error}; try a smaller --lr than {args.lr:g}")
            return {**best, "diverged": str(error)}
        record = {
            "epoch": epoch + 1,
            "lr": lr,
            "amp": machine.amp,
            "train_loss": loss,
            "val_loss": validation.loss,
            "accuracy": validation.accuracy,
        }
        run.save_epoch(record, {"network": network.state_dict(), "optimizer": optimizer.state_dict()})
        if best["epoch"] is None or merit(record) > merit(best):
            best = record
            save_best()
        say(
            f"  epoch {epoch + 1:3d}/{args.epochs}  lr {lr:.4f}  train loss {loss:.4f}  "
            f"val loss {validation.loss:.4f}  accuracy {validation.accuracy:5.2f}%  best {best['accuracy']:5.2f}%"
        )
    return best
