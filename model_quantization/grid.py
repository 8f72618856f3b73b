"""The grid over centroid and lambda multipliers: every pair a run of its own, from the same checkpoint."""

import itertools
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from engine.device import Machine, choose_machine
from engine.distributed import barrier
from engine.evaluation import Diverged, as_stored, evaluate, say_test
from engine.fit import fit
from engine.images.batches import Data, ImageRequest, load_data
from engine.objective import objective_of, taught, teacher_checkpoint
from engine.program.errors import UserError
from engine.program.memory import peak_memory, say_peak_memory
from engine.program.network_flags import wanted_spec
from engine.program.processes import is_first, world_size
from engine.program.report import duration, narrate, say, short
from engine.store.checkpoint import Checkpoint, as_built, find, read_network
from engine.store.files import Held, hold
from engine.store.run_folder import Record, Run, resume_from, shaping
from engine.store.run_list import list_of
from engine.training import derived_seed
from model import row_of
from model.own import is_own
from model.selection import TERNARY, Patterns
from model_quantization.arguments import ALL, FP_MODEL, FP_MODELS, SWEEP_G
from model_quantization.budget import Budget, options_within
from model_quantization.choosing import choose, say_costs, show
from model_quantization.comparison import Choice, read_best, shown, write
from model_quantization.pretrained import published_weights
from model_quantization.quantized_layers import AUTO
from model_quantization.training import Quantization, Recipe
from rulers import RULERS
from rulers.tally import task_of


def run(args: Namespace) -> int:
    """Run this shard's pairs of the grid; compare all finished ones; copy the best network."""
    if args.list:
        say(list_of(Path(args.save_dir)))
        return 0
    if args.do_prune and (args.bits or args.budget or args.retrain_only):
        raise UserError(
            "--do-prune: pruned layers keep their values; leave it out, or --bits, --budget, --retrain-only"
        )
    if args.budget and (args.bits or of_layers(args.lambda_max_divrs) or args.retrain_only):
        raise UserError("--budget chooses bits and g of each layer; leave it out, or --bits, PATTERN=G, --retrain-only")
    checkpoint = full_precision(args)
    machine = choose_machine(args.cuda, args.amp, args.compile, args.graphs)
    data = load_data(request_of(checkpoint, args), machine.device)
    checkpoint = checkpoint.run_at(data.image_size)
    checkpoint = checkpoint.with_classes(data.classes, data.name, args.data_path, derived_seed(args.seed[0], 0))
    teacher = teacher_checkpoint(args.teacher, args.teacher_model, checkpoint, Path(FP_MODELS), data)
    recipes = recipes_of(checkpoint, teacher, data, args)
    kind = "prune" if args.do_prune else "retrain" if args.retrain_only else "quantize"
    layers = choose(checkpoint, data.image_size, recipes[0].patterns, kind)
    if args.budget:
        strengths = [0.0] if args.lambda_max_divrs == SWEEP_G else args.lambda_max_divrs
        names = list(layers.chosen)
        found = options_within(Budget(*args.budget), checkpoint, names, strengths, data, machine.in_32_bit())
        bits, g = {name: option.bits for name, option in found.items()}, {name: o.g for name, o in found.items()}
        layers = replace(layers, chosen=bits, g=g)
        recipes = [replace(recipe, bits=tuple(bits.items()), strengths=tuple(g.items())) for recipe in recipes]
    not_as_published = is_own(checkpoint.spec["name"]) or recipes[0].patterns != Patterns()
    verb, listed = "Pruned" if args.do_prune else "Quantized", args.dry_run or not_as_published
    show(checkpoint, layers, verb, listed, say if args.dry_run else narrate)
    if args.dry_run:
        say_costs(checkpoint, data, machine)
        return 0
    if args.eval:
        network = machine.place(checkpoint.network())
        accuracy = evaluate(network, data, machine.in_32_bit()).accuracy
        say(f"{checkpoint.path}: accuracy {accuracy:.2f}% before quantization")
        checkpoint = replace(checkpoint, extra=checkpoint.extra | {"accuracy": accuracy, "dataset": data.name})
    objective = objective_of(recipes[0], teacher, machine)

    def learner(recipe: Recipe) -> Quantization:
        return Quantization(checkpoint, layers, data, machine, recipe, objective)

    return sweep(learner, recipes, checkpoint, data, machine, args)


def sweep(
    learner: Callable[[Recipe], Quantization],
    recipes: list[Recipe],
    checkpoint: Checkpoint,
    data: Data,
    machine: Machine,
    args: Namespace,
) -> int:
    """Run this shard's pairs; compare all finished ones, after every pair and in the end."""
    save_dir, name = Path(args.save_dir), checkpoint.path.stem
    runs = [
        Run(save_dir, f"{name}_s{short(recipe.s)}_g{recipe.g:g}", shaping(recipe), args.tensorboard)
        for recipe in recipes
    ]
    if args.resume:
        resume_from(Path(args.resume), runs)
    if not args.shard and world_size() > 1:
        raise UserError("--shard any is for processes that know nothing of each other; leave it out under torchrun")
    if not args.epochs + args.retrain_epochs:
        narrate("Quantized without training (--epochs 0 --retrain-epochs 0)")
    shard, shards = args.shard or (1, 1)
    mine = list(zip(recipes, runs, strict=True))[shard - 1 :: shards]
    began, trained = time.monotonic(), 0
    for i, (recipe, pair) in enumerate(mine):
        left = f", about {duration((time.monotonic() - began) / trained * (len(mine) - i))} left" if trained else ""
        seed = f", seed {recipe.seed}" if len(set(args.seed)) > 1 else ""
        narrate(f"\nPair {i + 1} of {len(mine)}{left}: s {short(recipe.s)}, g {recipe.g:g}{seed}  ({pair.folder})")
        trained += run_if_due(learner, recipe, pair, args)
        if args.plot_ternarization and is_first() and (result := pair.result):
            from model_quantization.ternarization_plot import plot_ternarization  # and matplotlib

            best = read_best(pair, result["phase"])
            narrate(f"  plot: {plot_ternarization(best, pair, result, checkpoint.state_dict)}")
        if is_first() and i + 1 < len(mine):
            compare(runs, checkpoint, data, machine, args, last=False)
    return finish(compare(runs, checkpoint, data, machine, args, last=True), args) if is_first() else 0


def compare(
    runs: list[Run], checkpoint: Checkpoint, data: Data, machine: Machine, args: Namespace, last: bool
) -> list[Record]:
    """Write what is finished of `runs`, and after the `last` pair say it; all results."""
    folder = runs[0].folder.parent
    with hold(folder / f"{checkpoint.path.stem}_sweep.lock", wait=True):  # so that no table lacks what another finished
        finished = [(run, result) for run in runs if (result := run.result)]
        if finished:
            best = write(finished, runs, checkpoint, data, Choice(args.select, args.threshold))
        if finished and last:
            say("\n" + shown(finished, runs, best))
            say_test(best.path, data, machine)
    return [result for _, result in finished]


def finish(results: list[Record], args: Namespace) -> int:
    """The last lines, and the exit code; UserError where every pair diverged."""
    if not results:
        say("\nThis shard has no pair of the grid, and none is finished yet")
    elif all(result.get("diverged") for result in results):
        raise UserError(f"every pair diverged, see above; try a smaller --lr than {args.lr:g}")
    say_peak_memory()
    return 0


def run_if_due(learner: Callable[[Recipe], Quantization], recipe: Recipe, pair: Run, args: Namespace) -> bool:
    """Train a pair, unless it is finished or, with `--shard any`, another process is at it; whether it was trained."""
    result, trained = pair.result, False
    if result and not args.no_resume:
        narrate(f"  finished before with {result['accuracy']:.2f}% at {result['zeros']:.2f}% zeros")
    else:
        try:
            pair.open(resume=not args.no_resume)
        except Held:
            if args.shard:
                raise
            narrate("  another process is working on it")
            return False
        result, trained = run_pair(learner(recipe), pair), True
    return trained


def full_precision(args: Namespace) -> Checkpoint:
    """The network to quantize: of a file, or the user's own as its builder builds it."""
    wanted = wanted_spec(args.model, args.dw_multps, args.phi, args.model_args)
    if args.pretrained:
        return read_network(published_weights(args.model), wanted)
    if is_own(args.model or "") and args.model_dict is None:
        torch.manual_seed(derived_seed(args.seed[0], 0))
        return as_built(wanted)
    return read_network(find(FP_MODEL if args.model_dict is None else args.model_dict, Path(FP_MODELS)), wanted)


def request_of(checkpoint: Checkpoint, args: Namespace) -> ImageRequest:
    """The data set that the flags name, else the checkpoint's; validation images only where nothing is trained."""
    name = args.dataset or checkpoint.extra.get("dataset") or "CIFAR100"
    row = row_of(checkpoint.spec["name"])
    return ImageRequest(
        name,
        args.data_path,
        image_size=args.image_size or checkpoint.extra.get("image_size") or (200 if name == "ImageNet" else None),
        val_image_size=row.image_size if row.validated_at_image_size else None,
        batch_size=args.batch_size,
        val_batch_size=args.val_batch_size,
        workers=args.workers,
        preprocessing=row.preprocessing,
        train=args.epochs + args.retrain_epochs > 0 or args.holdout > 0,
        holdout=args.holdout,
        split=args.split,
        augment_as=args.augment_as,
    )


def of_layers(strengths: list[float | tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """Those values of `--lambda-max-divrs` that are of layers, not of pairs."""
    return tuple(g for g in strengths if isinstance(g, tuple))


def recipes_of(checkpoint: Checkpoint, teacher: Checkpoint | None, data: Data, args: Namespace) -> list[Recipe]:
    """The recipe of every pair of the grid, at each seed, in the order in which they run."""
    strengths = [] if args.budget else [g for g in args.lambda_max_divrs if not isinstance(g, tuple)]
    grid = list(dict.fromkeys(itertools.product(args.ini_c_divrs, strengths or [0.0])))
    if args.retrain_only:
        grid = [(AUTO, 0.0)]  # which are the checkpoint's own centroids and assignment
    s, g = grid[0]
    first = Recipe(
        model_dict=checkpoint.path.name,
        sha256=checkpoint.sha256,
        dataset=data.name,
        data=data.digest,
        image_size=data.image_size,
        s=s,
        g=g,
        epochs=args.epochs,
        retrain_epochs=args.retrain_epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        lr2=args.lr2,
        schedule=args.schedule,
        weight_decay=args.weight_decay,
        lambda_sustain=args.lambda_sustain,
        do_prune=args.do_prune,
        seed=args.seed[0],
        amp=args.amp,
        compile=args.compile,
        layers=tuple(args.layers),
        without=tuple(args.without),
        keep_zeros=args.keep_zeros,
        retrain_only=args.retrain_only,
        bits=tuple(sorted(args.bits, key=lambda one: one[0] != ALL)),
        strengths=of_layers(args.lambda_max_divrs),
        **taught(args, teacher),
    )
    return [replace(first, s=s, g=g, seed=seed) for s, g in grid for seed in dict.fromkeys(args.seed)]


def run_pair(learner: Quantization, run: Run) -> Record:
    """Train and score one pair; return its result, which is then in its run too."""
    recipe = learner.recipe
    try:
        best = fit(learner, recipe.phases, run)
        best = {key: value for key, value in best.items() if key != "layers"}
    except Diverged as error:
        raise UserError(f"{error} before any training; take another --model-dict") from None
    result = {"s": recipe.s, "g": recipe.g, "seed": recipe.seed, **best, **scored(learner, run, best)}
    result |= {"seconds": run.seconds, "peak_memory": peak_memory()}
    run.finish(result)
    return result


def scored(learner: Quantization, run: Run, best: Record) -> Record:
    """What the best network counts as and reaches with parameters of 16 bit, as stage 3 scores it by default.

    Counted at the size of the validation images on the `published` ruler, or on `challenge` where that has no form: it
    knows no other quantized layers than ternary ones.
    """
    barrier()  # until the first process has written that network
    content = read_best(run, best["phase"])
    network = Checkpoint(run.folder, content["model"], content["state_dict"]).network()
    name = content["model"]["name"]
    ternary = set(learner.layers.bits.values()) == {TERNARY}
    ruler = next(ruler for ruler in RULERS.values() if ruler.families is None or (ternary and ruler.knows(name)))
    data, machine = learner.data, learner.machine
    tally = ruler.count(network, name, data.val_image_size, ruler.widths())
    evaluation = evaluate(machine.place(as_stored(network)), data, machine.in_32_bit())
    return {
        "accuracy_16_bit": evaluation.accuracy,
        "ruler": tally.ruler,
        "params": tally.params,
        "scoring_params": tally.total_scoring_params,
        "mflop": tally.total_mflop,
        "score": tally.score(task_of(data.name)),
    }
