"""The grid search: one training run a grid point, a table of all, the best network kept."""

from argparse import Namespace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.device import Machine, choose_machine
from engine.images.batches import Data, ImageRequest, ImagesOnDisk, load_data
from engine.program.errors import UserError
from engine.program.memory import peak_memory, say_peak_memory
from engine.program.network_flags import scaled
from engine.program.processes import is_first
from engine.program.report import say, table, with_unit
from engine.store.checkpoint import copy
from engine.store.run_folder import Run, resume_from
from engine.training import derived_seed
from model import build
from model.micronet import MicroNet
from model_compound_scaling.training import train

RESULT_ARGUMENTS = ("epochs", "start_epoch", "batch_size", "lr", "momentum", "weight_decay", "seed", "amp", "compile")


def run(args: Namespace) -> int:
    """Train every grid point, print the comparison, copy the best network to `best_model.pt`."""
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}")
    points = list(zip(args.grid[::2], args.grid[1::2]))
    multipliers = [scaled(d, w, args.phi) for d, w in points]
    machine = choose_machine(args.cuda, args.amp, args.compile)
    request = ImageRequest(
        args.dataset or "CIFAR100",
        args.data_path,
        image_size=args.image_size,
        batch_size=args.batch_size,
        val_batch_size=args.val_batch_size,
        workers=args.workers,
    )
    data = load_data(request, machine.device)
    save_dir = Path(args.save_dir)
    runs = [point_run(save_dir, d, w, data, args) for d, w in points]
    if args.resume:
        resume_from(Path(args.resume), runs)

    results = []
    for (d, w), depth_width, point in zip(points, multipliers, runs):
        say(f"\nGrid point d {d:g}, w {w:g}, phi {args.phi:g}  ({point.folder})")
        results.append({"d": d, "w": w} | train_point(depth_width, data, machine, args, point))
    if not is_first():
        return 0
    say("\n" + comparison(results))
    best = max(range(len(points)), key=lambda i: results[i]["accuracy"])
    best_file = runs[best].folder / "best.pt"
    if not best_file.is_file():
        raise UserError(f"no grid point finished an epoch; try a smaller --lr than {args.lr:g}")
    copy(best_file, save_dir / "best_model.pt")
    d, w = points[best]
    say(f"\nBest: d {d:g}, w {w:g} with {results[best]['accuracy']:.2f}% -> {save_dir / 'best_model.pt'}")
    say_peak_memory()
    return 0


def point_run(save_dir: Path, d: float, w: float, data: Data, args: Namespace) -> Run:
    """The run of grid point (d, w): its label and every argument that shapes its result."""
    arguments = {"dataset": data.name, "data": data.digest, "image_size": data.image_size}
    arguments |= {"d": d, "w": w, "phi": args.phi}
    arguments |= {name: getattr(args, name) for name in RESULT_ARGUMENTS}
    return Run(save_dir, f"{data.name}_d{d:g}_w{w:g}_phi{args.phi:g}", arguments)


def train_point(multipliers: dict, data: Data, machine: Machine, args: Namespace, run: Run) -> dict:
    """Train MicroNet at `depth` and `width`, or continue or skip it; return its row of the comparison."""
    name = "imagenet_micronet" if isinstance(data, ImagesOnDisk) else "cifar_micronet"
    spec = {"name": name, **multipliers, "num_classes": len(data.classes)}
    if run.result and not args.no_resume:
        say(f"  finished before with {run.result['accuracy']:.2f}%")
        return run.result
    torch.manual_seed(derived_seed(args.seed, 0, 0))
    network = build(spec)
    row = {**size(network, data.image_size), "spec": spec}
    say(f"  {row['blocks']} blocks of {row['channels']} channels, {row['params']:,} parameters")
    run.open(resume=not args.no_resume)
    best = train(network, spec, data, machine, args, run)
    row |= {"accuracy": best["accuracy"], "best_epoch": best["epoch"], "diverged": best.get("diverged")}
    row |= {"seconds": run.seconds, "peak_memory": peak_memory()}
    run.finish(row)
    return row


def size(network: MicroNet, image_size: int) -> dict:
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


def comparison(results: list[dict]) -> str:
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
