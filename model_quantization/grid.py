"""The sweep over centroid and lambda multipliers: every pair a run of its own, from the same checkpoint."""

import hashlib
import itertools
import json
from argparse import Namespace
from pathlib import Path

import torch

from engine.device import Machine, choose_machine
from engine.distributed import wait_for_all
from engine.evaluation import evaluate, rounded_to_16_bit
from engine.images.batches import Data, load_data
from engine.program.errors import UserError
from engine.program.memory import peak_memory, say_peak_memory
from engine.program.network_flags import wanted_spec
from engine.program.processes import is_first
from engine.program.report import say, table
from engine.store.checkpoint import Checkpoint, expecting, find, read_network, save
from engine.store.files import hold
from engine.store.restore import check_alike
from engine.store.run_folder import Run, resume_from, write_text
from engine.training import derived_seed
from model import build, row_of
from model_quantization.arguments import FP_MODELS
from model_quantization.plots import plot_layers, plot_sweep, plot_ternarization
from model_quantization.pretrained import published_weights
from model_quantization.training import Point
from rulers import RULERS
from rulers.tally import task_of

RESULT_ARGUMENTS = (
    "epochs",
    "retrain_epochs",
    "batch_size",
    "lr",
    "lr2",
    "schedule",
    "weight_decay",
    "lambda_sustain",
    "do_prune",
    "seed",
    "amp",
    "compile",
)


def run(args: Namespace) -> int:
    """Run this shard's pairs of the grid; compare all finished ones; copy the best network."""
    path = published_weights(args.model) if args.pretrained else find(args.model_dict, Path(FP_MODELS))
    checkpoint = read_network(path, wanted_spec(args.model, args.dw_multps, args.phi))
    machine = choose_machine(args.cuda, args.amp, args.compile)
    data = checkpoint_data(checkpoint, args, machine)
    checkpoint = checkpoint.with_classes(data.classes, data.name, args.data_path, derived_seed(args.seed, 0))
    if args.eval:
        network = machine.place(checkpoint.network())
        accuracy = evaluate(network, data, machine.in_32_bit()).accuracy
        say(f"{path}: accuracy {accuracy:.2f}% before quantization")

    save_dir = Path(args.save_dir)
    grid = list(itertools.product(args.ini_c_divrs, args.lambda_max_divrs))
    runs = [point_run(save_dir, s, g, checkpoint, data, args) for s, g in grid]
    if args.resume:
        resume_from(Path(args.resume), runs)
    shard, shards = args.shard
    for (s, g), point in list(zip(grid, runs))[shard - 1 :: shards]:
        run_point(s, g, checkpoint, data, machine, args, point)
    if not is_first():
        return 0

    with hold(save_dir / f"{path.stem}_sweep.lock", wait=True):  # so that no shard's table lacks what another finished
        compare(runs, path, data, args)
    say_peak_memory()
    return 0


def compare(runs: list[Run], path: Path, data: Data, args: Namespace) -> None:
    """Compare all finished runs; write the table, the plots and the best network beside them."""
    save_dir, task = Path(args.save_dir), task_of(data.name)
    finished = [run for run in runs if run.result]
    results = [run.result for run in finished]
    if not results:
        say(f"\nShard {args.shard[0]}/{args.shard[1]} has no pair of this grid, and none is finished yet")
        return
    threshold = task.threshold_percent if args.threshold is None else args.threshold
    best = select(results, args.select, threshold)
    say("\n" + comparison(results, best))
    best_path, stem = save_dir / "Ternary_best_acc.pt", save_dir / path.stem
    content = read_best(finished[best], results[best]["phase"])
    save({key: value for key, value in content.items() if key != "layers"}, best_path)
    write_text(stem.with_name(f"{stem.name}_sweep.json"), json.dumps(results, indent=2) + "\n")
    is_own_task = task.is_solved_by(data.name, len(data.classes))
    held = threshold if is_own_task or args.threshold is not None else None
    title = f"{path.stem}, {data.name}"
    pictures = [
        plot_sweep(results, best, held, title, stem.with_name(f"{stem.name}_sweep.png")),
        plot_layers(content["assignments"], results[best], title, stem.with_name(f"{stem.name}_layers.png")),
    ]
    say(f"\nPlots: {' '.join(map(str, pictures))}")
    row = results[best]
    rule = "accuracy" if args.select == "accuracy" else f"score at {threshold:g}% or more"
    say(
        f"Best by {rule}: s {row['s']:g}, g {row['g']:g}, {row['accuracy']:.2f}%, "
        f"{row['zeros']:.2f}% zeros -> {best_path}"
    )
    if all(r.get("diverged") for r in results):
        raise UserError(f"every pair diverged, see above; try a smaller --lr than {args.lr:g}")


def checkpoint_data(checkpoint: Checkpoint, args: Namespace, machine: Machine) -> Data:
    """The data set that the flags name, else the checkpoint's; validation images only where nothing is trained."""
    name = args.dataset or checkpoint.extra.get("dataset") or "CIFAR100"
    row = row_of(checkpoint.spec["name"])
    return load_data(
        name,
        args.data_path,
        machine.device,
        image_size=args.image_size or checkpoint.extra.get("image_size") or (200 if name == "ImageNet" else None),
        val_image_size=row.image_size if row.validated_at_image_size else None,
        batch_size=args.batch_size,
        val_batch_size=args.val_batch_size,
        workers=args.workers,
        preprocessing=row.preprocessing,
        train=args.epochs + args.retrain_epochs > 0,
    )


def point_run(save_dir: Path, s: float, g: float, checkpoint: Checkpoint, data: Data, args: Namespace) -> Run:
    """The run of grid point (s, g): its label and every argument that shapes its result."""
    arguments = {"model_dict": checkpoint.path.name, "sha256": hashlib.sha256(checkpoint.path.read_bytes()).hexdigest()}
    arguments |= {"dataset": data.name, "data": data.digest, "image_size": data.image_size, "s": s, "g": g}
    arguments |= {name: getattr(args, name) for name in RESULT_ARGUMENTS}
    return Run(save_dir, f"{checkpoint.path.stem}_s{s:g}_g{g:g}", arguments)


def read_best(run: Run, phase: str) -> dict:
    """Read the best network of a phase, checked to be whole: tensors, assignments and centroids by layer."""
    path = run.folder / f"best_{phase}.pt"
    checkpoint = read_network(path)
    with expecting(path, "the best network of this run"):
        assignments, centroids = checkpoint.extra["assignments"], checkpoint.extra["centroids"]
        if not assignments or assignments.keys() != centroids.keys():
            raise ValueError("assignments and centroids of different layers")
        for name, assignment in assignments.items():
            check_alike(name, assignment, checkpoint.state_dict[name].to(torch.int8))
            check_alike(name, centroids[name], torch.zeros(2))
    return {"model": checkpoint.spec, "state_dict": checkpoint.state_dict, **checkpoint.extra}


def run_point(
    s: float, g: float, checkpoint: Checkpoint, data: Data, machine: Machine, args: Namespace, run: Run
) -> None:
    """Run grid point (s, g), or continue it; skip it if it is finished."""
    say(f"\nGrid point s {s:g}, g {g:g}  ({run.folder})")
    if run.result and not args.no_resume:
        say(f"  finished before with {run.result['accuracy']:.2f}% at {run.result['zeros']:.2f}% zeros")
    else:
        run.open(resume=not args.no_resume)
        best = Point(checkpoint, s, g, data, machine, args, run).train()
        result = {"s": s, "g": g, **best, **scored(run, best, data, machine)}
        run.finish(result | {"seconds": run.seconds, "peak_memory": peak_memory()})
    if args.plot_ternarization and is_first():
        say(f"  plot: {plot_ternarization(read_best(run, run.result['phase']), run)}")


def scored(run: Run, best: dict, data: Data, machine: Machine) -> dict:
    """What the best network counts as and reaches with parameters of 16 bit, as stage 3 scores it by default.

    Counted on the `published` ruler, or on `challenge` where that has no form, at the size of the validation images.
    """
    wait_for_all()  # until the first process has written that network
    content = read_best(run, best["phase"])
    network = build(content["model"])
    network.load_state_dict(content["state_dict"])
    name = content["model"]["name"]
    ruler = next(ruler for ruler in RULERS.values() if ruler.knows(name))
    tally = ruler.count(network, name, data.val_image_size, ruler.widths())
    evaluation = evaluate(machine.place(rounded_to_16_bit(network)), data, machine.in_32_bit())
    return {
        "accuracy_16_bit": evaluation.accuracy,
        "ruler": tally.ruler,
        "params": tally.params,
        "scoring_params": tally.total_scoring_params,
        "mflop": tally.total_mflop,
        "score": tally.score(task_of(data.name)),
    }


def select(results: list[dict], by: str, threshold: float) -> int:
    """The index of the best result: the highest accuracy, or the smallest score that holds `threshold` percent.

    The score is that of 16-bit parameters, and so is the accuracy that must hold the threshold. Where none holds it,
    the highest accuracy is best by score too. Among equal accuracies the smallest score is best.
    """
    if by == "score":
        holding = [i for i, r in enumerate(results) if r["accuracy_16_bit"] >= threshold]
        if holding:
            return min(holding, key=lambda i: results[i]["score"])
        say(f"\nNo network holds {threshold:g}% with 16 bit: the highest accuracy counts")
    return max(range(len(results)), key=lambda i: (results[i]["accuracy"], -results[i]["score"]))


def comparison(results: list[dict], best: int) -> str:
    """The table of all finished grid points, the best one marked."""
    headers = [
        "s",
        "g",
        "accuracy",
        "at 16 bit",
        "zeros",
        "entropy",
        "scoring params",
        "MFLOP",
        "score",
        "best epoch",
        "time",
        "",
    ]
    rows = [
        [
            f"{r['s']:g}",
            f"{r['g']:g}",
            f"{r['accuracy']:.2f}%",
            f"{r['accuracy_16_bit']:.2f}%",
            f"{r['zeros']:.2f}%",
            f"{r['entropy']:.3f} bit",
            f"{r['scoring_params']:,.0f}",
            f"{r['mflop']:.2f}",
            f"{r['score']:.5f}",
            f"{r['phase']} {r['epoch']}",
            f"{r['seconds']:.0f} s",
            ", ".join(["best"] * (i == best) + ["diverged"] * bool(r.get("diverged"))),
        ]
        for i, r in enumerate(results)
    ]
    return table(headers, rows)
