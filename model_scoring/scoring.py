"""Scoring: read a network, count it on every ruler, evaluate it, export it."""

import json
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

import rulers
from engine.activations import QuantizedActivations
from engine.device import choose_machine
from engine.evaluation import Evaluation, as_stored, evaluate
from engine.images.batches import ImageRequest, load_data
from engine.program.errors import UserError
from engine.program.memory import peak_memory, say_peak_memory
from engine.program.network_flags import wanted_spec
from engine.program.report import narrate, say
from engine.store.checkpoint import Checkpoint, find
from engine.store.files import write_text
from model import Spec, row_of
from model.identify import describe
from model_scoring.arguments import FP_MODELS, T_MODEL, T_MODELS
from model_scoring.batch_norm import merge_batch_norm
from model_scoring.export import Exports, export
from model_scoring.networks import Wanted, examples, load, running, said
from model_scoring.onnx_file import OnnxNetwork
from model_scoring.pruning import prune_depthwise
from model_scoring.tables import as_dict, before_and_after, listing, summary
from rulers import RULERS
from rulers.tally import Tally, Task, task_of

Loaded = tuple[Checkpoint, nn.Module]


@dataclass(frozen=True)
class Recipe:
    """What shapes a score.

    Attributes:
        ruler: the one that is listed in detail.
        half_precision: whether a stored value has 16 bit, else 32.
        mul_bits: width of the inputs of multiplications.
        add_bits: width of the inputs of additions; None for each ruler's own.
        act_bits: width of activations, which are quantized in evaluation; None for 32-bit ones that count as stated.
        prune_threshold: as `prune_depthwise` has it.
        image_size: side of the images that are counted and evaluated, pixels.
        wanted: the network; its shapes are counted instead of images.
        baseline: what scores are relative to; None for the data set's task.
        listed: whether every layer is shown.
    """

    ruler: str
    half_precision: bool
    mul_bits: int
    add_bits: int | None
    act_bits: int | None
    prune_threshold: float
    image_size: int
    wanted: Wanted
    baseline: Task | None = None
    listed: bool = False

    def in_32_bit(self) -> "Recipe":
        """The same for a full-precision network."""
        return replace(self, half_precision=False, mul_bits=32, add_bits=32, act_bits=None)


@dataclass(frozen=True)
class Images:
    """The validation images, and where and how they are evaluated."""

    dataset: str
    data_path: str
    batch_size: int
    workers: int
    cuda: bool


def run(args: Namespace) -> int:
    """Score the network `--t-model`."""
    spec = wanted_spec(args.model, args.dw_multps, args.phi, args.model_args)
    wanted = Wanted(spec, examples(args.input_shape or []))
    path = checked_path(args, wanted)
    checkpoint, network = load(path, wanted, args.image_size)
    before = load_before(args.before, wanted, args.image_size) if args.before else None
    for file in filter(None, (args.json, args.pack, args.unpack, args.onnx)):
        if Path(file).is_dir():
            raise UserError(f"{file} is a folder; pass the name of a file to write")
    dataset = args.dataset or checkpoint.extra.get("dataset") or default_dataset(checkpoint.spec)
    recipe = Recipe(
        args.accounting,
        args.halfprecision,
        args.mul_bits,
        args.add_bits,
        args.act_bits,
        args.prune_threshold,
        args.image_size or checkpoint.image_size or row_of(checkpoint.spec["name"]).image_size,
        wanted,
        args.baseline,
        args.layers,
    )
    images = None
    if args.eval:
        images = Images(dataset, args.data_path, args.val_batch_size, args.workers, args.cuda)
    if args.shrink and not args.onnx:
        raise UserError("--shrink is for the ONNX file; pass --onnx FILE, or leave it out")
    written = args.pack, args.unpack, args.halfprecision, args.onnx, args.onnx_opset, args.shrink
    exports = Exports(args.save, args.pt_sparse, *written)

    prune_depthwise(network, recipe.prune_threshold)
    if args.merge_batch_norm:
        merge_batch_norm(network)
    inputs = f"input of {said(wanted.shapes)}" if wanted.shapes else f"image of {recipe.image_size} px"
    narrate(f"{path or 'as it is built'}: {describe(checkpoint.spec)}, operations of one {inputs}")
    report, tally = score((checkpoint, network), before, dataset, recipe, images, exports)
    say_peak_memory()
    report["peak_memory"] = peak_memory()
    if args.json:
        write_text(Path(args.json), json.dumps(report, indent=2) + "\n")
    if args.strict and (uncounted := tally.uncounted):
        names = ", ".join(sorted({entry.operation for entry in uncounted}))
        raise UserError(
            f"{checkpoint.path}: operations without a rule ({names}); leave --strict out to score without them"
        )
    return 0


def checked_path(args: Namespace, wanted: Wanted) -> Path | None:
    """The file to score, None for the user's own network as it is built; UserError where the flags do not fit."""
    if args.eval and wanted.shapes:
        raise UserError("--eval is for images; pass --image-size, or leave --input-shape out")
    if wanted.builder and args.t_model is None:
        return None
    return find(T_MODEL if args.t_model is None else args.t_model, Path(T_MODELS))


def load_before(name: str, wanted: Wanted, image_size: int | None) -> Loaded:
    """The full-precision network `--before`: of the wanted name, if any, but of any multipliers."""
    same = {key: value for key, value in wanted.spec.items() if key in ("name", "arguments")}
    return load(find(name, Path(FP_MODELS), Path(T_MODELS)), replace(wanted, spec=same), image_size)


def default_dataset(spec: Spec) -> str:
    """The data set that a network with these classes was made for."""
    return {1000: "ImageNet", 10: "CIFAR10"}.get(spec["num_classes"], "CIFAR100")


def score(
    loaded: Loaded, before: Loaded | None, dataset: str, recipe: Recipe, images: Images | None, exports: Exports
) -> tuple[dict[str, Any], Tally]:
    """Count, export, evaluate and compare a network, and print it; the report, and the tally listed in detail."""
    (checkpoint, network), task = loaded, recipe.baseline or task_of(dataset)
    tallies = count_all(loaded, recipe)
    tally = tallies[recipe.ruler]
    export(network, checkpoint, exports, recipe.wanted.shapes or recipe.image_size)
    evaluation = evaluate_network(loaded, recipe, images, exports.onnx) if images else None
    say(summary(tallies, task, dataset, checkpoint.spec["num_classes"], evaluation))
    if recipe.listed:
        say("\n" + listing(tally))
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint.path),
        "model": checkpoint.spec,
        "dataset": dataset,
        "image_size": recipe.image_size,
        **({"input_shapes": said(recipe.wanted.shapes)} if recipe.wanted.shapes else {}),
        "task": asdict(task),
        "rulers": {name: as_dict(tally, task) for name, tally in tallies.items()},
        "evaluation": as_dict_of(evaluation),
    }
    if before:
        other, recipe = before[0], recipe.in_32_bit()
        first = count_all(before, recipe)[recipe.ruler]
        report["before"], accuracy = as_dict(first, task), None
        if images and evaluation and other.spec["num_classes"] == checkpoint.spec["num_classes"]:
            accuracy = evaluate_network(before, recipe, images)
            report["before"]["evaluation"] = as_dict_of(accuracy)
        names = f"{other.path.name} at 32 bit, {checkpoint.path.name} as above"
        say(f"\nBefore and after, {recipe.ruler} ruler ({names})")
        say(before_and_after(first, tally, task, (accuracy, evaluation)))
    return report, tally


def count_all(loaded: Loaded, recipe: Recipe) -> dict[str, Tally]:
    """The tallies of all rulers that know the network, by ruler; UserError if the recipe's is not among them."""
    checkpoint, network = loaded
    name, value = checkpoint.spec["name"], 16 if recipe.half_precision else 32
    with running(recipe.wanted, recipe.image_size):
        shapes = recipe.wanted.shapes or recipe.image_size
        bits = rulers.StatedWidths(value=value, mul=recipe.mul_bits, add=recipe.add_bits, act=recipe.act_bits)
        tallies = rulers.count(network, shapes, name, **bits)
    if recipe.ruler not in tallies:
        known = ", ".join(RULERS[recipe.ruler].models)
        raise UserError(f"the {recipe.ruler} ruler has no form for {name}, only for {known}; take another --accounting")
    return tallies


def evaluate_network(loaded: Loaded, recipe: Recipe, images: Images, onnx: str | None = None) -> Evaluation:
    """Evaluate a network with the values that packing keeps of it; the arithmetic is of 32 bit always.

    With `act_bits`, what is multiplied is rounded to as many before.

    The file `onnx` of it is evaluated too, where ONNX Runtime is installed, and a line says how often it is right.
    """
    checkpoint, network = loaded
    machine = choose_machine(images.cuda)
    request = ImageRequest(
        images.dataset,
        images.data_path,
        image_size=recipe.image_size,
        val_batch_size=images.batch_size,
        workers=images.workers,
        preprocessing=row_of(checkpoint.spec["name"]).preprocessing,
        train=False,
    )
    data = load_data(request, machine.device)
    checkpoint.check_classes(data.classes, data.name, images.data_path)
    if onnx and find_spec("onnxruntime"):
        file = evaluate(OnnxNetwork(Path(onnx).read_bytes()), data, machine)
        say(f"{onnx}: {file.accuracy:.2f}% ({file.correct:,} of {file.images:,} right) in ONNX Runtime")
    stored = machine.place(as_stored(network, recipe.half_precision))
    if recipe.act_bits:
        stored = QuantizedActivations(stored, recipe.act_bits)
        sample, _ = next(data.spread(data.val_batch_size).val_batches())
        stored(sample)  # which decides the ranges
    return evaluate(stored, data, machine)


def as_dict_of(evaluation: Evaluation | None) -> dict[str, Any] | None:
    """An evaluation, ready for JSON."""
    return {**asdict(evaluation), "accuracy": evaluation.accuracy} if evaluation else None
