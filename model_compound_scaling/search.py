"""The grid search: one training run a grid point, a table of all, the best network kept."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.device import Machine, choose_machine
from engine.fit import fit
from engine.images.batches import Data, ImageRequest, ImagesOnDisk, load_data
from engine.program.errors import UserError
from engine.program.memory import peak_memory, say_peak_memory
from engine.program.network_flags import scaled
from engine.program.processes import is_first
from engine.program.report import say, table, with_unit
from engine.store.checkpoint import copy
from engine.store.run_folder import Record, Run, resume_from
from engine.training import derived_seed
from model import Spec, build, row_of
from model.micronet import MicroNet
from model_compound_scaling.training import Recipe, Scratch


def run(args: Namespace) -> int:
    """Train every grid point, print the comparison, copy the best network to `best_model.pt`."""
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}")
    points = list(zip(args.grid[::2], args.grid[1::2], strict=True))
    multipliers = [scaled(d, w, args.phi) for d, w in points]
    machine = choose_machine(args.cuda, args.amp, args.compile)
    request = ImageRequest(
        args.dataset or "CIFAR100",
        args.data_path,
        image_size=args.image_size,
        batch_size=args.batch_size,
        val_batch_size=args.val_batch_size,
        workers=args.workers,
        preprocessing=row_of("imagenet_micronet").preprocessing,
    )
    data = load_data(request, machine.device)
    save_dir, recipes = Path(args.save_dir), [recipe_of(d, w, data, args) for d, w in points]
    runs = [Run(save_dir, f"{data.name}_d{r.d:g}_w{r.w:g}_phi{r.phi:g}", asdict(r)) for r in recipes]
    if args.resume:
        resume_from(Path(args.resume), runs)

    results = []
    for recipe, depth_width, point in zip(recipes, multipliers, runs, strict=True):
        say(f"\nGrid point d {recipe.d:g}, w {recipe.w:g}, phi {recipe.phi:g}  ({point.folder})")
        if point.result and not args.no_resume:
            say(f"  finished before with {point.result['accuracy']:.2f}%")
            row = point.result
        else:
            row = train_point(recipe, depth_width, data, machine, point, resume=not args.no_resume)
        results.append({"d": recipe.d, "w": recipe.w} | row)
    if is_first():
        compare(results, runs, save_dir, args.lr)
        say_peak_memory()
    return 0


def recipe_of(d: float, w: float, data: Data, args: Namespace) -> Recipe:
    """All that shapes the result of grid point (d, w)."""
    return Recipe(
        dataset=data.name,
        data=data.digest,
        image_size=data.image_size,
        d=d,
        w=w,
        phi=args.phi,
        epochs=args.epochs,
        start_epoch=args.start_epoch,
        batch_size=args.batch_size,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        seed=args.seed,
        amp=args.amp,
        compile=args.compile,
    )


def train_point(recipe: Recipe, multipliers: Spec, data: Data, machine: Machine, run: Run, *, resume: bool) -> Record:
    """Train MicroNet at `depth` and `width`, or continue; return its row of the comparison."""
    name = "imagenet_micronet" if isinstance(data, ImagesOnDisk) else "cifar_micronet"
    spec = {"name": name, **multipliers, "num_classes": len(data.classes)}
    torch.manual_seed(derived_seed(recipe.seed, 0, 0))
    network = build(spec)
    assert isinstance(network, MicroNet)
    row = {**size(network, data.image_size), "spec": spec}
    say(f"  {row['blocks']} blocks of {row['channels']} channels, {row['params']:,} parameters")
    run.open(resume=resume)
    learner = Scratch(network, spec, data, machine, recipe)
    best = fit(learner, learner.phases, run)
    row |= {"accuracy": best["accuracy"], "best_epoch": best["epoch"], "diverged": best.get("diverged")}
    row |= {"seconds": run.seconds, "peak_memory": peak_memory()}
    run.finish(row)
    return row


def compare(results: list[Record], runs: list[Run], save_dir: Path, lr: float) -> None:
    """Print the comparison; copy the best network to `best_model.pt`."""
    say("\n" + comparison(results))
    best = max(range(len(results)), key=lambda i: results[i]["accuracy"])
    best_file = runs[best].folder / "best.pt"
    if not best_file.is_file():
        raise UserError(f"no grid point finished an epoch; try a smaller --lr than {lr:g}")
    copy(best_file, save_dir / "best_model.pt")
    row = results[best]
    say(f"\nBest: d {row['d']:g}, w {row['w']:g} with {row['accuracy']:.2f}% -> {save_dir / 'best_model.pt'}")


def size(network: MicroNet, image_size: int) -> Record:
    """Blocks and channels of each stage, parameters, and FLOP of one image (2 a multiply-accumulate, dense)."""
    stages = [getattr(network, f"layer{i + 1}") for i in range(network.num_stages)]
    image = torch.zeros(1, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(image)
    return {
        "blocks": "-".join(str(len(stage)) for stage in stages),
        "channels": "-".join(str(stage[-1].conv2.out_channels) for stage in stages),
        "params": sum(p.numel() for p in network.parameters()),
        "flop": counter.get_total_flops(),
    }


def comparison(results: list[Record]) -> str:
    """The table of all grid points."""
    headers = ["d", "w", "depth", "width", "blocks", "channels", "params", "FLOP", "accuracy", "epoch"]
    rows = [
        [
            f"{r['d']:g}",
            f"{r['w']:g}",
            f"{r['spec']['depth']:.2f}",
            f"{r['spec']['width']:.2f}",
            r["blocks"],
            r["channels"],
            with_unit(r["params"]),
            with_unit(r["flop"]),
            f"{r['accuracy']:.2f}%",
            f"{r['best_epoch'] or '-'}{' (diverged)' if r['diverged'] else ''}",
        ]
        for r in results
    ]
    return table(headers, rows)
