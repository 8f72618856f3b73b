"""Scoring: read a checkpoint, count it, evaluate it, export it."""

from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

from engine.checkpoint import Checkpoint, describe, find, read_network, wanted_spec
from engine.data import load_data
from engine.device import choose_machine
from engine.evaluation import Evaluation, evaluate
from engine.report import say, table
from engine.rulers import published
from engine.rulers.tally import TASKS, Tally, Task, Widths
from model import EFFICIENTNETS
from model.layers import is_ternary, ternary_candidates
from model_scoring.arguments import SAVED_LAYERS, T_MODELS
from model_scoring.layers import save_layer


def run(args: Namespace) -> int:
    """Score the checkpoint `--t-model`."""
    checkpoint = read_network(
        find(args.t_model, Path(T_MODELS)), wanted_spec(args.model, args.dw_multps, args.phi)
    )
    say(f"{checkpoint.path}: {describe(checkpoint.spec)}")
    network = checkpoint.network().eval()
    published.prune_depthwise(network, args.prune_threshold)
    dataset = args.dataset or checkpoint.extra.get("dataset") or default_dataset(checkpoint.spec)
    image_size = args.image_size or checkpoint.extra.get("image_size") or default_image_size(checkpoint.spec)
    widths = Widths(16 if args.halfprecision else 32, args.mul_bits, args.add_bits)
    tally = published.count(network, checkpoint.spec["name"], image_size, widths)
    task = TASKS["ImageNet" if dataset == "ImageNet" else "CIFAR-100"]
    say(listing(tally))
    evaluation = evaluate_checkpoint(network, checkpoint, dataset, image_size, args) if args.eval else None
    say(summary(tally, task, dataset, evaluation))
    if args.save or args.pt_sparse:
        folder = Path(SAVED_LAYERS) / checkpoint.path.stem
        number = export(network, checkpoint.spec, folder, args.pt_sparse)
        say(f"{number} ternary layers written to {folder}")
    return 0


def default_dataset(spec: dict) -> str:
    """The data set that a network with these classes was made for."""
    return {1000: "ImageNet", 10: "CIFAR10"}.get(spec["num_classes"], "CIFAR100")


def default_image_size(spec: dict) -> int:
    """The image size in pixels that a network is scored at unless the user or the checkpoint says another."""
    if spec["name"] in EFFICIENTNETS:
        from model.efficientnet import native_image_size

        return native_image_size(spec["name"])
    return 200 if spec["name"] == "imagenet_micronet" else 32


def evaluate_checkpoint(
    network: nn.Module, checkpoint: Checkpoint, dataset: str, image_size: int, args: Namespace
) -> Evaluation:
    """Evaluate the network as it is counted: with half precision, every parameter is rounded to 16 bit first."""
    machine = choose_machine(args.cuda, args.amp, args.compile)
    data = load_data(
        dataset,
        args.data_path,
        machine.device,
        image_size=image_size,
        val_batch_size=args.val_batch_size,
        workers=args.workers,
        bicubic=checkpoint.spec["name"] in EFFICIENTNETS,
        train=False,
    )
    checkpoint.check_classes(data.classes, data.name, args.data_path)
    if args.halfprecision:
        for parameter in network.parameters():
            parameter.data = parameter.data.half().float()
    return evaluate(machine.place(network), data, machine)


def listing(tally: Tally) -> str:
    """Every layer, and every group's subtotal."""
    headers = ["layer", "kept as", "weights", "zeros", "params", "mults", "adds", "MFLOP"]
    rows = []
    for group in tally.groups:
        for line in group.lines:
            operations = line.mults * tally.widths.mul + line.adds * tally.widths.add
            rows.append(
                [
                    f"  {line.name}",
                    line.note,
                    f"{line.numel:,}",
                    f"{100 * (1 - line.nonzero / line.numel):.2f}%" if line.numel else "",
                    f"{line.bits / 32:,.0f}",
                    f"{line.mults:,.0f}",
                    f"{line.adds:,.0f}",
                    f"{operations / 32e6:.2f}",
                ]
            )
        subtotal = [f"{tally.scoring_params(group):,.0f}", f"{group.total('mults'):,.0f}", f"{group.total('adds'):,.0f}"]
        weights = group.total("numel")
        zeros = f"{100 * (1 - group.total('nonzero') / weights):.2f}%" if weights else ""
        rows.append([group.name.upper(), "", f"{weights:,}", zeros, *subtotal, f"{tally.mflop(group):.2f}"])
    return table(headers, rows)


def summary(tally: Tally, task: Task, dataset: str, evaluation: Evaluation | None) -> str:
    """The totals, the score against the task's baseline, and the accuracy against its threshold."""
    widths = tally.widths
    own_task = dataset.replace("-", "") == task.name.replace("-", "")
    lines = [
        "",
        f"Summary ({tally.ruler} ruler; values {widths.value} bit, multiplications {widths.mul} bit, "
        f"additions {widths.add} bit)",
        f"  Total number of network params  {tally.params:,}",
        f"  Zeros                           {tally.zeros_percent:.2f}%",
        f"  Scoring params                  {tally.total_scoring_params:,.0f} ({tally.megabytes:.3f} MB)",
        f"  Operations                      {tally.total_mflop:.2f} MFLOP",
        f"  Score                           {tally.total_scoring_params / task.base_params:.6f} + "
        f"{tally.total_mflop * 1e6 / task.base_ops:.6f} = {tally.score(task)!r}",
        f"  Baseline                        {task.name}: {task.base_params / 1e6:g}M params, "
        f"{task.base_ops / 1e6:,.0f}M operations{'' if own_task else f' ({dataset} is no task of the challenge)'}",
        f"  Threshold                       {task.correct:,} of {task.images:,} right on {task.name}",
    ]
    if evaluation:
        verdict = ""
        if own_task:
            holds = evaluation.correct * task.images >= task.correct * evaluation.images
            verdict = ", holds the threshold" if holds else ", misses the threshold"
        lines.append(
            f"  Accuracy                        {evaluation.accuracy:.2f}% "
            f"({evaluation.correct:,} of {evaluation.images:,} right{verdict}; values as stored, {widths.value} bit)"
        )
    return "\n".join(lines)


def export(network: nn.Module, spec: dict, folder: Path, coo: bool) -> int:
    """Write every ternary layer to a file of its own in `folder`; return how many there are."""
    weights = dict(network.named_parameters())
    names = [name for name in ternary_candidates(network, spec["name"]) if is_ternary(weights[name])]
    for name in names:
        save_layer(weights[name].detach(), folder / f"{name.removesuffix('.weight')}.pt", coo)
    return len(names)
