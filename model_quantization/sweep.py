"""The sweep over centroid and lambda multipliers: every pair a run of its own, from the same checkpoint."""

import hashlib
import itertools
import time
from argparse import Namespace
from pathlib import Path

from engine.checkpoint import Checkpoint, find, read, read_network, save, wanted_spec
from engine.data import Data, load_data
from engine.device import Machine, choose_machine
from engine.evaluation import evaluate
from engine.report import say, table
from engine.runs import Run, resume_from
from model import EFFICIENTNETS
from model_quantization.arguments import FP_MODELS
from model_quantization.training import Point

RESULT_ARGUMENTS = (
    *("epochs", "retrain_epochs", "batch_size", "lr", "lr2", "weight_decay", "lambda_sustain", "do_prune"),
    *("seed", "amp"),
)


def run(args: Namespace) -> int:
    """Run every pair of the grid, print the comparison, copy the best network to `Ternary_best_acc.pt`."""
    path = find(args.model_dict, Path(FP_MODELS))
    checkpoint = read_network(path, wanted_spec(args.model, args.dw_multps, args.phi))
    machine = choose_machine(args.cuda, args.amp, args.compile)
    data = checkpoint_data(checkpoint, args, machine)
    if args.eval:
        evaluation = evaluate(machine.place(checkpoint.network()), data, machine)
        say(f"{path}: accuracy {evaluation.accuracy:.2f}% before quantization")

    save_dir = Path(args.save_dir)
    grid = list(itertools.product(args.ini_c_divrs, args.lambda_max_divrs))
    runs = [point_run(save_dir, s, g, checkpoint, data, args) for s, g in grid]
    if args.resume:
        resume_from(Path(args.resume), runs)
    results = [run_point(s, g, checkpoint, data, machine, args, point) for (s, g), point in zip(grid, runs)]

    say("\n" + comparison(results))
    best = max(results, key=lambda result: result["accuracy"])
    content = read(Path(best["file"]))
    del content["layers"]
    save(content, save_dir / "Ternary_best_acc.pt")
    say(
        f"\nBest: s {best['s']:g}, g {best['g']:g} with {best['accuracy']:.2f}% at {best['zeros']:.2f}% zeros"
        f" -> {save_dir / 'Ternary_best_acc.pt'}"
    )
    return 0


def checkpoint_data(checkpoint: Checkpoint, args: Namespace, machine: Machine) -> Data:
    """The data set that the flags name, else the checkpoint's; its classes must be as many as the network's."""
    name = args.dataset or checkpoint.extra.get("dataset") or "CIFAR100"
    efficientnet = checkpoint.spec["name"] in EFFICIENTNETS
    val_image_size = None
    if efficientnet:
        from model.efficientnet import native_image_size

        val_image_size = native_image_size(checkpoint.spec["name"])
    data = load_data(
        name,
        args.data_path,
        machine.device,
        image_size=args.image_size or checkpoint.extra.get("image_size") or (200 if name == "ImageNet" else None),
        val_image_size=val_image_size,
        batch_size=args.batch_size,
        val_batch_size=args.val_batch_size,
        workers=args.workers,
        bicubic=efficientnet,
    )
    checkpoint.check_classes(data.classes, data.name, args.data_path)
    return data


def point_run(save_dir: Path, s: float, g: float, checkpoint: Checkpoint, data: Data, args: Namespace) -> Run:
    """The run of grid point (s, g): its label and every argument that shapes its result."""
    arguments = {"model_dict": checkpoint.path.name, "sha256": hashlib.sha256(checkpoint.path.read_bytes()).hexdigest()}
    arguments |= {"dataset": data.name, "image_size": data.image_size, "s": s, "g": g}
    arguments |= {name: getattr(args, name) for name in RESULT_ARGUMENTS}
    return Run(save_dir, f"{checkpoint.path.stem}_s{s:g}_g{g:g}", arguments)


def run_point(
    s: float, g: float, checkpoint: Checkpoint, data: Data, machine: Machine, args: Namespace, run: Run
) -> dict:
    """Run grid point (s, g), or continue or skip it, and return its row of the comparison."""
    say(f"\nGrid point s {s:g}, g {g:g}  ({run.folder})")
    result = None if args.no_resume else run.result
    if result:
        say(f"  finished before with {result['accuracy']:.2f}% at {result['zeros']:.2f}% zeros")
    else:
        run.open(resume=not args.no_resume)
        point = Point(checkpoint, s, g, data, machine, args, run)
        start = time.monotonic()
        best = point.train()
        result = {"s": s, "g": g, **best, "file": str(point.best_file(best["phase"]))}
        result["seconds"] = time.monotonic() - start
        if "diverged" not in best:
            run.finish(result)
    if args.plot_ternarization:
        from model_quantization.plots import plot_ternarization

        picture = plot_ternarization(read(Path(result["file"])), run, result)
        say(f"  plot: {picture}")
    return result


def comparison(results: list[dict]) -> str:
    """The table of all grid points."""
    headers = ["s", "g", "accuracy", "zeros", "entropy", "best epoch", "time"]
    rows = [
        [
            f"{r['s']:g}",
            f"{r['g']:g}",
            f"{r['accuracy']:.2f}%",
            f"{r['zeros']:.2f}%",
            f"{r['entropy']:.3f} bit",
            f"{r['phase']} {r['epoch']}",
            f"{r['seconds']:.0f} s",
        ]
        for r in results
    ]
    return table(headers, rows)
