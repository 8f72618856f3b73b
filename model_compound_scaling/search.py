"""Stage 1's runs: one a grid point, or a single network; a table of all, the best network kept."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.device import Machine, choose_machine
from engine.evaluation import dense_flop, say_test
from engine.fit import fit
from engine.images.batches import Data, ImageRequest, load_data
from engine.images.photographs import ImagesOnDisk
from engine.objective import SELF, Objective, objective_of, taught, teacher_checkpoint
from engine.program.errors import UserError
from engine.program.memory import peak_memory, say_peak_memory
from engine.program.network_flags import scaled, wanted_spec
from engine.program.processes import is_first
from engine.program.report import narrate, say, table, with_unit
from engine.store.checkpoint import Checkpoint, find, read, read_network
from engine.store.run_folder import Record, Run, publish, resume_from, shaping
from engine.store.run_list import list_of
from engine.training import derived_seed
from model import Spec, build, row_of
from model.micronet import MicroNet
from model.own import is_own, label_of, run_once, takes
from model.registry import Row
from model_compound_scaling.training import Recipe, Scratch


@dataclass(frozen=True)
class Candidate:
    """A network to train: `draw` gives it as it is before the training that `recipe` says, and its spec."""

    name: str
    label: str
    recipe: Recipe
    draw: Callable[[], tuple[nn.Module, Spec]]


def run(args: Namespace) -> int:
    """Train every candidate, print the comparison, copy the best network to `best_model.pt`."""
    if args.list:
        say(list_of(Path(args.save_dir)))
        return 0
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}")
    checkpoint = (
        read_network(find(args.init, Path()), wanted_spec(args.model, arguments=args.model_args)) if args.init else None
    )
    model = checkpoint.spec["name"] if checkpoint else args.model
    is_scaled = not checkpoint and (not model or row_of(model).family == "micronet")
    multipliers = grid_of(args) if is_scaled else []
    machine = choose_machine(args.cuda, args.amp, args.compile, args.graphs)
    data = load_data(request_of(row_of(model or "imagenet_micronet"), args), machine.device)
    if checkpoint:
        checkpoint = checkpoint.run_at(data.image_size)
        checkpoint = checkpoint.with_classes(data.classes, data.name, args.data_path, derived_seed(args.seed[0], 0, 0))
    teacher = teacher_of(args, checkpoint, data)
    recipe = recipe_of(checkpoint, teacher, data, args)
    candidates = []
    for seed in dict.fromkeys(args.seed):
        of_seed = replace(recipe, seed=seed)
        grid = [grid_point(replace(of_seed, d=d, w=w, phi=args.phi), data) for d, w in multipliers]
        candidates += grid or [alone(of_seed, checkpoint, data)]
    return train_all(candidates, objective_of(recipe, teacher, machine), data, machine, args)


def train_all(candidates: list[Candidate], objective: Objective, data: Data, machine: Machine, args: Namespace) -> int:
    """Train every candidate that is not finished; compare all."""
    save_dir = Path(args.save_dir)
    runs = [Run(save_dir, f"{data.name}_{one.label}", shaping(one.recipe), args.tensorboard) for one in candidates]
    if args.resume:
        resume_from(Path(args.resume), runs)
    results = []
    for candidate, point in zip(candidates, runs, strict=True):
        narrate(f"\n{candidate.name}  ({point.folder})")
        if point.result and not args.no_resume:
            narrate(f"  finished before with {point.result['accuracy']:.2f}%")
            row = point.result
        else:
            point.open(resume=not args.no_resume)
            row = train(candidate, data, machine, objective, point)
        results.append({"d": candidate.recipe.d, "w": candidate.recipe.w} | row)
    if is_first():
        say_test(compare(results, runs, save_dir, args.lr), data, machine)
        say_peak_memory()
    return 0


def grid_of(args: Namespace) -> list[tuple[float, float]]:
    """The pairs of multipliers; UserError where nobody can mean such a network."""
    points = list(zip(args.grid[::2], args.grid[1::2], strict=True))
    for d, w in points:
        scaled(d, w, args.phi)
    return points


def request_of(row: Row, args: Namespace) -> ImageRequest:
    """The images that the flags name, as the network `row` is to see them."""
    return ImageRequest(
        args.dataset or "CIFAR100",
        args.data_path,
        image_size=args.image_size,
        val_image_size=row.image_size if row.validated_at_image_size else None,
        batch_size=args.batch_size,
        val_batch_size=args.val_batch_size,
        workers=args.workers,
        preprocessing=row.preprocessing,
        holdout=args.holdout,
        split=args.split,
        augment_as=args.augment_as,
    )


def teacher_of(args: Namespace, checkpoint: Checkpoint | None, data: Data) -> Checkpoint | None:
    """The teacher that the flags name; UserError where the network itself is to teach, but starts at random."""
    if args.teacher == SELF and not checkpoint:
        raise UserError("--teacher self: a network that starts at random has nothing to teach; pass --init FILE")
    return teacher_checkpoint(args.teacher, args.teacher_model, checkpoint, Path(), data)


def recipe_of(checkpoint: Checkpoint | None, teacher: Checkpoint | None, data: Data, args: Namespace) -> Recipe:
    """All that shapes a result, but for the multipliers of a grid point."""
    return Recipe(
        dataset=data.name,
        data=data.digest,
        image_size=data.image_size,
        d=None,
        w=None,
        phi=None,
        epochs=args.epochs,
        start_epoch=args.start_epoch,
        batch_size=args.batch_size,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        seed=args.seed[0],
        amp=args.amp,
        compile=args.compile,
        model=checkpoint.spec["name"] if checkpoint else args.model,
        model_args=tuple(args.model_args),
        init=checkpoint.path.name if checkpoint else None,
        init_sha256=checkpoint.sha256 if checkpoint else None,
        **taught(args, teacher),
    )


def grid_point(recipe: Recipe, data: Data) -> Candidate:
    """MicroNet(d^phi, w^phi)."""
    assert recipe.d and recipe.w and recipe.phi is not None
    name = recipe.model or ("imagenet_micronet" if isinstance(data, ImagesOnDisk) else "cifar_micronet")
    spec = {"name": name, **scaled(recipe.d, recipe.w, recipe.phi), "num_classes": len(data.classes)}
    return Candidate(
        f"Grid point d {recipe.d:g}, w {recipe.w:g}, phi {recipe.phi:g}",
        f"d{recipe.d:g}_w{recipe.w:g}_phi{recipe.phi:g}",
        recipe,
        lambda: (drawn(spec, recipe.seed), spec),
    )


def alone(recipe: Recipe, checkpoint: Checkpoint | None, data: Data) -> Candidate:
    """A network that is not scaled, from a checkpoint or from nothing; UserError where it has other classes."""
    assert recipe.model
    if checkpoint:
        return Candidate(recipe.model, checkpoint.path.stem, recipe, lambda: (checkpoint.network(), checkpoint.spec))
    classes, own = len(data.classes), is_own(recipe.model)
    spec: dict[str, Any] = {"name": recipe.model, "num_classes": classes}
    if own:
        given = dict(recipe.model_args)
        fitting = {"num_classes": classes} if takes(recipe.model, "num_classes") else {}
        spec["arguments"] = fitting | given
        found = run_once(drawn(spec, recipe.seed), data.image_size).classes
        if found != classes:
            raise UserError(
                f"--model {recipe.model} builds a network of {found} classes, {data.name} has {classes}; "
                f"pass --model-args that make it build as many"
            )
    label = label_of(recipe.model) if own else recipe.model
    return Candidate(recipe.model, label, recipe, lambda: (drawn(spec, recipe.seed), spec))


def drawn(spec: Spec, seed: int) -> nn.Module:
    """The network that `spec` describes, with weights that `seed` draws."""
    torch.manual_seed(derived_seed(seed, 0, 0))
    return build(spec)


def train(candidate: Candidate, data: Data, machine: Machine, objective: Objective, run: Run) -> Record:
    """Train a network, or continue; return its row of the comparison."""
    network, spec = candidate.draw()
    row = {**size(network, data.image_size), "spec": spec}
    blocks = f"{row['blocks']} blocks of {row['channels']} channels, " if "blocks" in row else ""
    narrate(f"  {blocks}{row['params']:,} parameters")
    learner = Scratch(network, spec, data, machine, candidate.recipe, objective)
    best = fit(learner, learner.phases, run)
    row |= {"accuracy": best["accuracy"], "best_epoch": best["epoch"], "diverged": best.get("diverged")}
    row |= {"seconds": run.seconds, "peak_memory": peak_memory()}
    run.finish(row)
    return row


def compare(results: list[Record], runs: list[Run], save_dir: Path, lr: float) -> Path:
    """Print the comparison; copy the best network to `best_model.pt`, which is returned."""
    say("\n" + comparison(results))
    best = max(range(len(results)), key=lambda i: results[i]["accuracy"])
    best_file = runs[best].folder / "best.pt"
    if not best_file.is_file():
        raise UserError(f"no run finished an epoch; try a smaller --lr than {lr:g}")
    publish(read(best_file), save_dir / "best_model.pt", runs[best], runs)
    row = results[best]
    which = f"d {row['d']:g}, w {row['w']:g}" if row["d"] else row["spec"]["name"]
    say(f"\nBest: {which} with {row['accuracy']:.2f}% -> {save_dir / 'best_model.pt'}")
    return save_dir / "best_model.pt"


def size(network: nn.Module, image_size: int) -> Record:
    """Parameters, and FLOP of one image (2 a multiply-accumulate, dense); of MicroNet also its stages."""
    stages = {}
    if isinstance(network, MicroNet):
        blocks = [getattr(network, f"layer{i + 1}") for i in range(network.num_stages)]
        stages = {
            "blocks": "-".join(str(len(stage)) for stage in blocks),
            "channels": "-".join(str(stage[-1].conv2.out_channels) for stage in blocks),
        }
    flop = dense_flop(network, image_size)
    return {**stages, "params": sum(p.numel() for p in network.parameters()), "flop": flop}


SCALING: dict[str, Callable[[Record], str]] = {
    "d": lambda r: f"{r['d']:g}",
    "w": lambda r: f"{r['w']:g}",
    "depth": lambda r: f"{r['spec']['depth']:.2f}",
    "width": lambda r: f"{r['spec']['width']:.2f}",
    "blocks": lambda r: r["blocks"],
    "channels": lambda r: r["channels"],
}


def comparison(results: list[Record]) -> str:
    """The table of all runs, those of a grid with what was scaled."""
    columns: dict[str, Callable[[Record], str]] = {
        **(SCALING if results[0]["d"] else {"network": lambda r: r["spec"]["name"]}),
        "params": lambda r: with_unit(r["params"]),
        "FLOP": lambda r: with_unit(r["flop"]),
        "accuracy": lambda r: f"{r['accuracy']:.2f}%",
        "epoch": lambda r: f"{r['best_epoch'] or '-'}{' (diverged)' if r['diverged'] else ''}",
    }
    return table(list(columns), [[column(r) for column in columns.values()] for r in results])
