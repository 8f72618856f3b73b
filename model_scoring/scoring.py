"""Scoring: read a network, count it on every ruler, evaluate it, export it."""

import copy
import importlib
import json
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from engine.device import choose_machine
from engine.evaluation import Evaluation, evaluate, rounded_to_16_bit
from engine.images.batches import ImageRequest, load_data
from engine.program.errors import UserError
from engine.program.memory import peak_memory, say_peak_memory
from engine.program.network_flags import wanted_spec
from engine.program.report import say, table, with_unit
from engine.store.checkpoint import (
    Checkpoint,
    find,
    naming,
    network_content,
    read_network,
    read_state_dict,
    save,
)
from engine.store.files import write_text
from model import row_of
from model.identify import check_wanted, describe, mismatches
from model.selection import is_ternary
from model_scoring.arguments import SAVED_LAYERS, T_MODELS
from model_scoring.masks import save_layer
from model_scoring.packing import is_packed, read_packed, write_packed
from rulers import challenge, improved, published
from rulers.tally import Tally, Task, Widths, task_of


def run(args: Namespace) -> int:
    """Score the network `--t-model`."""
    path = find(args.t_model, Path(T_MODELS))
    checkpoint, network = load(path, args)
    before = load_before(args) if args.before else None
    for file in filter(None, (args.json, args.pack, args.unpack)):
        if Path(file).is_dir():
            raise UserError(f"{file} is a folder; pass the name of a file to write")
    published.prune_depthwise(network, args.prune_threshold)
    dataset = args.dataset or checkpoint.extra.get("dataset") or default_dataset(checkpoint.spec)
    image_size = args.image_size or checkpoint.image_size or row_of(checkpoint.spec["name"]).image_size
    task = task_of(dataset)
    say(f"{path}: {describe(checkpoint.spec)}, operations of one image of {image_size} px")

    tallies = count_all(network, checkpoint.spec, image_size, args)
    tally = on_ruler(args.accounting, tallies, checkpoint.spec)
    say(listing(tally))
    export(network, checkpoint, args)
    evaluation = evaluate_network(network, checkpoint, dataset, image_size, args) if args.eval else None
    say(summary(tallies, task, dataset, checkpoint.spec["num_classes"], evaluation))
    report = {
        "checkpoint": str(path),
        "model": checkpoint.spec,
        "dataset": dataset,
        "image_size": image_size,
        "task": asdict(task),
        "rulers": {name: as_dict(tally, task) for name, tally in tallies.items()},
        "evaluation": evaluation and {**asdict(evaluation), "accuracy": evaluation.accuracy},
    }
    if before:
        report["before"] = before_and_after(args, before, tally, task, report, evaluation)
    say_peak_memory()
    report["peak_memory"] = peak_memory()
    if args.json:
        write_text(Path(args.json), json.dumps(report, indent=2) + "\n")
    if args.strict and (uncounted := tally.uncounted):
        names = ", ".join(sorted({entry.operation for entry in uncounted}))
        raise UserError(f"{path}: operations without a rule ({names}); leave --strict out to score without them")
    return 0


def load(path: Path, args: Namespace) -> tuple[Checkpoint, nn.Module]:
    """Read a checkpoint, a packed file, or a checkpoint of the user's own builder `--model module:function`."""
    if args.model and ":" in args.model:
        if args.pack or args.unpack:
            raise UserError(f"--model {args.model}: packed files hold built-in models only; leave --pack, --unpack out")
        network, state_dict = own_network(args.model), read_state_dict(path)
        if differences := mismatches(network.state_dict(), state_dict):
            raise UserError(f"{path} does not fit what {args.model} builds: {differences[0]}")
        network.load_state_dict(state_dict, strict=False)
        spec = {"name": args.model, "num_classes": number_of_outputs(network.eval(), args.image_size or 32)}
        return Checkpoint(path, spec, state_dict), network
    wanted = wanted_spec(args.model, args.dw_multps, args.phi)
    if is_packed(path) or path.suffix == ".safetensors":
        checkpoint = read_packed(path)
        with naming(path):
            check_wanted(wanted, checkpoint.spec, checkpoint.state_dict)
    else:
        checkpoint = read_network(path, wanted)
    return checkpoint, checkpoint.network().eval()


def own_network(builder: str) -> nn.Module:
    """Call the user's own `module:function`, found in the current folder or on Python's path."""
    module, _, function = builder.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        network = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--model {builder}: {error}; it must name a function without arguments") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"--model {builder} built a {type(network).__name__}, not a torch.nn.Module")
    return network


@torch.no_grad()
def number_of_outputs(network: nn.Module, image_size: int) -> int:
    """How many logits a user's own network gives for an image."""
    return network(torch.zeros(1, 3, image_size, image_size)).shape[-1]


def count_all(network: nn.Module, spec: dict, image_size: int, args: Namespace) -> dict[str, Tally]:
    """The tallies of all rulers that know the network, by ruler."""
    value = 16 if args.halfprecision else 32

    def widths(add: int) -> Widths:
        return Widths(value, args.mul_bits, args.add_bits or add)

    tallies = {}
    if spec["name"] in published.MODELS:
        tallies["published"] = published.count(network, spec["name"], image_size, widths(16))
    tallies["challenge"] = challenge.count(network, image_size, widths(32))
    tallies["improved"] = improved.count(network, image_size, widths(32))
    return tallies


def default_dataset(spec: dict) -> str:
    """The data set that a network with these classes was made for."""
    return {1000: "ImageNet", 10: "CIFAR10"}.get(spec["num_classes"], "CIFAR100")


def on_ruler(ruler: str, tallies: dict[str, Tally], spec: dict) -> Tally:
    if ruler not in tallies:
        raise UserError(
            f"the published ruler has no form for {spec['name']}, only for {', '.join(published.MODELS)}; "
            f"take another --accounting"
        )
    return tallies[ruler]


def evaluate_network(
    network: nn.Module, checkpoint: Checkpoint, dataset: str, image_size: int, args: Namespace
) -> Evaluation:
    """Evaluate the network as it is counted: with half precision, every parameter is rounded to 16 bit first."""
    machine = choose_machine(args.cuda, args.amp, args.compile)
    request = ImageRequest(
        dataset,
        args.data_path,
        image_size=image_size,
        val_batch_size=args.val_batch_size,
        workers=args.workers,
        preprocessing=row_of(checkpoint.spec["name"]).preprocessing,
        train=False,
    )
    data = load_data(request, machine.device)
    checkpoint.check_classes(data.classes, data.name, args.data_path)
    network = rounded_to_16_bit(network) if args.halfprecision else copy.deepcopy(network)  # what is exported stays
    return evaluate(machine.place(network), data, machine)


def listing(tally: Tally) -> str:
    """Every layer, and every group's subtotal."""
    headers = ["layer", "kept as", "weights", "zeros", "params", "mults", "adds", "MFLOP"]
    rows = []
    for group in tally.groups:
        rows += [
            [f"  {line.name}", line.note, *_amounts(line.numel, line.nonzero), f"{line.bits / 32:,.0f}",
             f"{line.mults:,.0f}", f"{line.adds:,.0f}", f"{tally.line_mflop(line):.2f}"]
            for line in group.lines
        ]  # fmt: skip
        totals = {key: group.total(key) for key in ("numel", "nonzero", "mults", "adds")}
        rows.append(
            [group.name.upper(), "", *_amounts(totals["numel"], totals["nonzero"]),
             f"{tally.scoring_params(group):,.0f}", f"{totals['mults']:,.0f}", f"{totals['adds']:,.0f}",
             f"{tally.mflop(group):.2f}"]
        )  # fmt: skip
    return f"The {tally.ruler} ruler\n\n" + table(headers, rows)


def _amounts(numel: float, nonzero: float) -> tuple[str, str]:
    return (f"{numel:,.0f}", f"{100 * (1 - nonzero / numel):.2f}%") if numel else ("", "")


def summary(tallies: dict[str, Tally], task: Task, dataset: str, classes: int, evaluation: Evaluation | None) -> str:
    """The totals of every ruler, the score against the task's baseline, the accuracy against its threshold."""
    headers = ["ruler", "bits (value/mul/add)", "params", "zeros", "scoring params", "MB", "MFLOP", "score"]
    rows = [
        [
            name,
            f"{tally.widths.value}/{tally.widths.mul}/{tally.widths.add}",
            f"{tally.params:,}",
            f"{tally.zeros_percent:.2f}%",
            f"{tally.total_scoring_params:,.0f}",
            f"{tally.megabytes:.3f}",
            f"{tally.total_mflop:.2f}",
            f"{tally.score(task):.14f}",
        ]
        for name, tally in tallies.items()
    ]
    own_task = task.is_solved_by(dataset, classes)
    lines = [
        "\nSummary",
        table(headers, rows),
        f"Baseline   {task.name}: {with_unit(task.base_params)} params, {with_unit(task.base_ops)} operations"
        + ("" if own_task else f" ({dataset} with {classes} classes is no task of the challenge)"),
        f"Threshold  {task.correct:,} of {task.images:,} right on {task.name}",
    ]
    if evaluation:
        verdict = ""
        if own_task:
            holds = evaluation.correct * task.images >= task.correct * evaluation.images
            verdict = ", which holds the threshold" if holds else ", which misses the threshold"
        value = next(iter(tallies.values())).widths.value
        lines.append(
            f"Accuracy   {evaluation.accuracy:.2f}% ({evaluation.correct:,} of {evaluation.images:,} right{verdict}; "
            f"parameters rounded to {value} bit)"
        )
    for name, tally in tallies.items():
        for entry in tally.uncounted:
            lines.append(f"Uncounted  {name}: {entry.operation}, {entry.count} times in {entry.place or 'the network'}")
    return "\n".join(lines)


def plain(args: Namespace) -> Namespace:
    """The arguments for the full-precision network `--before`: 32 bit throughout, and nothing of the other network's."""
    return Namespace(
        **{**vars(args), "halfprecision": False, "mul_bits": 32, "add_bits": 32, "dw_multps": None, "phi": None}
    )


def load_before(args: Namespace) -> tuple[Checkpoint, nn.Module]:
    return load(find(args.before, Path(T_MODELS)), plain(args))


def before_and_after(
    args: Namespace,
    before: tuple[Checkpoint, nn.Module],
    after: Tally,
    task: Task,
    report: dict,
    evaluation: Evaluation | None,
) -> dict:
    """Print what the full-precision network `before` counts as, at 32 bit, beside the compressed one.

    A network of other classes (one that the compressed one's features came from) has no accuracy here.
    """
    checkpoint, network = before
    image_size, args = report["image_size"], plain(args)
    tally = on_ruler(after.ruler, count_all(network, checkpoint.spec, image_size, args), checkpoint.spec)
    rows = [
        ["zeros", f"{tally.zeros_percent:.2f}%", f"{after.zeros_percent:.2f}%"],
        ["scoring params", *(with_unit(t.total_scoring_params) for t in (tally, after))],
        ["FLOP", *(with_unit(t.total_mflop * 1e6) for t in (tally, after))],
        ["score", *(f"{t.score(task):.5f}" for t in (tally, after))],
    ]
    result = as_dict(tally, task)
    if evaluation:
        first = None
        if checkpoint.spec["num_classes"] == report["model"]["num_classes"]:
            first = evaluate_network(network, checkpoint, report["dataset"], image_size, args)
            result["evaluation"] = {**asdict(first), "accuracy": first.accuracy}
        rows.insert(0, ["accuracy", f"{first.accuracy:.2f}%" if first else "-", f"{evaluation.accuracy:.2f}%"])
    say(
        f"\nBefore and after, {after.ruler} ruler ({checkpoint.path.name} at 32 bit, {Path(args.t_model).name} as above)"
    )
    say(table(["", "before", "after"], rows))
    return result


def as_dict(tally: Tally, task: Task) -> dict:
    """A tally with its sums, ready for JSON."""
    return {
        **asdict(tally),
        "zeros_percent": tally.zeros_percent,
        "scoring_params": tally.total_scoring_params,
        "megabytes": tally.megabytes,
        "mflop": tally.total_mflop,
        "score": tally.score(task),
        "subtotals": {
            group.name: {"scoring_params": tally.scoring_params(group), "mflop": tally.mflop(group)}
            for group in tally.groups
        },
    }


def export(network: nn.Module, checkpoint: Checkpoint, args: Namespace) -> None:
    """Write what `--save`, `--pt-sparse`, `--pack` and `--unpack` ask for."""
    if args.save or args.pt_sparse:
        folder = Path(SAVED_LAYERS) / checkpoint.path.stem
        layers = {n: p.detach() for n, p in network.named_parameters() if p.ndim > 1 and is_ternary(p)}
        for name, weight in layers.items():
            save_layer(weight, folder / f"{name.removesuffix('.weight')}.pt", coo=args.pt_sparse)
        say(f"{len(layers)} ternary layers -> {folder}")
    if args.pack:
        current = Checkpoint(checkpoint.path, checkpoint.spec, network.state_dict(), checkpoint.extra)
        report = write_packed(current, Path(args.pack))
        say(
            f"{report.file_bytes:,} bytes -> {args.pack} ({report.float32_bytes:,} as 32 bit values; ternary symbols "
            f"{report.ternary_bytes:,}, their entropy {report.entropy_bytes:,.0f})"
        )
    if args.unpack:
        save(network_content(checkpoint.spec, network, **checkpoint.extra), Path(args.unpack))
        say(f"checkpoint -> {args.unpack}")
