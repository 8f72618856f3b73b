"""The command line of `run_quantization.py`."""

import argparse
import re

from engine.program.arguments import (
    Parser,
    add_data_arguments,
    add_machine_arguments,
    add_objective_arguments,
    add_run_arguments,
    fraction,
    nonnegative_float,
    nonnegative_int,
    percent,
    positive_float,
    positive_int,
    positive_share,
    switch,
    truth,
)
from engine.program.network_flags import add_model_arguments

FP_MODELS = "model_quantization/trained_fp_models"
FP_MODEL = "MicroNet_d14_w12_phi35_acc8146_params8_06m.th"  # unless the user says another
DESCRIPTION = """\
Entropy-constrained trained ternarization (EC2T): ternarize a trained network at every pair of centroid and lambda
multipliers, then retrain with frozen assignment. The best network ends in SAVE_DIR/Ternary_best_acc.pt; every pair
keeps its own in a folder beside it.
"""
EPILOG = """\
example: the published CIFAR-100 run, on the network that stage 1 left in its folder
  python run_quantization.py --model-dict model_compound_scaling/saved_models/best_model.pt --dataset CIFAR100 \\
    --batch-size 128 --epochs 20 --retrain-epochs 20 --ini-c-divrs 0.45 --lambda-max-divrs 0.15
"""


ALL = "*"  # the pattern of all layers
SWEEP_G = [0.125, 0.15, 0.175]  # as in 2019


def _bits(text: str) -> tuple[str, int]:
    """Parse `B` or `PATTERN=B`."""
    pattern, _, bits = text.rpartition("=")
    if not re.fullmatch("[2-8]", bits):
        raise argparse.ArgumentTypeError(f"{text!r} is not B or PATTERN=B with B from 2 to 8")
    return pattern or ALL, int(bits)


def _strength(text: str) -> float | tuple[str, float]:
    """Parse `G` or `PATTERN=G`."""
    pattern, _, g = text.rpartition("=")
    return (pattern, fraction(g)) if pattern else fraction(text)


def _budget(text: str) -> tuple[float, str]:
    """Parse bytes, such as 130KB, or a score below 1: an amount and its unit."""
    units = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}
    match = re.fullmatch(r"([0-9.]+(?:e-?[0-9]+)?) ?([KMG]?B)?", text, re.IGNORECASE)
    try:
        amount = float(match[1]) * units[(match[2] or "").upper()] if match else 0.0
    except ValueError:
        amount = 0.0
    if not match or not amount > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither bytes, such as 130KB, nor a score below 1")
    return amount, "score" if amount < 1 else "bytes"


def _share_or_auto(text: str) -> float | str:
    return text if text == "auto" else positive_share(text)


def _shard(text: str) -> tuple[int, int] | None:
    """Parse `i/n`, with 1 <= i <= n; None for `any`."""
    if text == "any":
        return None
    if not (match := re.fullmatch(r"(\d+)/(\d+)", text)) or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, or any")
    return int(match[1]), int(match[2])


def parser() -> Parser:
    """Build the parser; defaults are those of the 2019 program, unless the checkpoint says otherwise."""
    parser = Parser(prog="run_quantization.py", description=DESCRIPTION, epilog=EPILOG)
    add_model_arguments(
        parser,
        "--model-dict",
        FP_MODEL,
        f"full-precision checkpoint: a path, or a file name in {FP_MODELS}",
        pretrained=True,
    )

    _add_layer_arguments(parser)
    _add_sweep_arguments(parser)
    _add_training_arguments(parser)
    add_data_arguments(
        parser,
        dataset="the checkpoint's, else CIFAR100",
        image_size="the checkpoint's, else 200 for ImageNet, 32 for the known small images, else their own; "
        "EfficientNets train at this size, and are validated and counted on photographs of their own",
    )
    add_machine_arguments(parser)
    runs = add_run_arguments(parser, "model_quantization/saved_models")
    runs.add_argument(
        "--plot-ternarization",
        type=truth,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="draw each pair's clusters, centroids, accuracy and zeros over the epochs",
    )
    return parser


def _add_sweep_arguments(parser: Parser) -> None:
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--ini-c-divrs",
        "--s",
        type=_share_or_auto,
        nargs="+",
        default=[0.15, 0.3, 0.5],
        metavar="S",
        help="initial outermost centroids, as shares of a layer's largest and smallest weight; or auto, the two steps "
        "of least squared error",
    )
    sweep.add_argument(
        "--lambda-max-divrs",
        "--g",
        type=_strength,
        nargs="+",
        default=SWEEP_G,
        metavar="[PATTERN=]G",
        help="entropy constraint, as a share of the lambda at which a cluster would vanish; of layers that match, as "
        "--layers has them, in every pair (the others take 0 where no G is given)",
    )
    sweep.add_argument(
        "--lambda-sustain",
        type=nonnegative_float,
        default=0.0,
        metavar="SIGMA",
        help="lets small layers keep a part of the constraint: delta' = (delta + sigma) / (1 + sigma)",
    )
    sweep.add_argument(
        "--select",
        choices=("accuracy", "score"),
        default="accuracy",
        help="the best network has the highest accuracy (as published), or the smallest score that holds --threshold",
    )
    sweep.add_argument(
        "--threshold",
        type=percent,
        metavar="PERCENT",
        help="accuracy to hold with --select score (default: the challenge's, 75 for ImageNet, else CIFAR-100's 80)",
    )
    sweep.add_argument(
        "--shard",
        type=_shard,
        default="1/1",
        metavar="I/N|any",
        help="run every N-th pair from the I-th on, or any that no other process is at: machines share a sweep, each "
        "table shows what all have finished",
    )
    switch(sweep, "do-prune", False, "prune instead; ternary layers stay fixed")


def _add_layer_arguments(parser: Parser) -> None:
    layers = parser.add_argument_group("layers")
    layers.add_argument(
        "--layers",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="quantize these: patterns such as 'layer1.*' of the names of weights or their modules (default: the "
        "published ones; in a network of your own all convolutions and linear layers but the first, the last, and "
        "depthwise ones)",
    )
    layers.add_argument(
        "--except", nargs="+", default=[], dest="without", metavar="PATTERN", help="leave these out, likewise"
    )
    layers.add_argument(
        "--bits",
        type=_bits,
        nargs="+",
        default=[],
        metavar="[PATTERN=]B",
        help="bits a weight, 2 (ternary) to 8, of the layers that match, likewise, or of all others (default: 2)",
    )
    layers.add_argument(
        "--budget",
        type=_budget,
        metavar="BYTES|SCORE",
        help="choose the bits of each layer so that all values take at most this many bytes (130KB, 4.3MB), or the "
        "network this score (below 1, on the challenge ruler), and answers change least; and g, 0 unless "
        "--lambda-max-divrs gives others to choose among",
    )
    layers.add_argument(
        "--keep-zeros",
        action="store_true",
        help="weights of these layers that are zero in the checkpoint, a pruned network's, stay zero",
    )
    layers.add_argument(
        "--dry-run", action="store_true", help="list the layers, and what an epoch will take, and train nothing"
    )


def _add_training_arguments(parser: Parser) -> None:
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=nonnegative_int, default=20, help="epochs of ternarization")
    training.add_argument("--retrain-epochs", type=nonnegative_int, default=15, help="epochs with frozen assignment")
    training.add_argument("--batch-size", type=positive_int, default=256, help="training images a step")
    training.add_argument("--val-batch-size", type=positive_int, default=512, help="validation images a step")
    training.add_argument("--lr", type=positive_float, default=1e-4, help="Adam's learning rate")
    training.add_argument("--lr2", type=positive_float, default=1e-5, help="Adam's learning rate of the centroids")
    training.add_argument(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="keep both learning rates, or let them fall to 0 over each phase along a half cosine",
    )
    training.add_argument(
        "--weight-decay", type=nonnegative_float, default=5e-6, help="L2 penalty of the parameters that stay dense"
    )
    training.add_argument(
        "--retrain-only",
        action="store_true",
        help="retrain the quantized layers of the checkpoint with their assignment frozen from the start; --epochs and "
        "the sweep's pairs do not count",
    )
    switch(training, "eval", False, "evaluate the full-precision network first")
    add_objective_arguments(parser, FP_MODELS)
