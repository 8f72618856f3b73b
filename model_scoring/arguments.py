"""The command line of `run_scoring.py`."""

import argparse

from engine.program.arguments import (
    Parser,
    add_data_arguments,
    add_machine_arguments,
    positive_float,
    positive_int,
    positive_share,
    switch,
)
from engine.program.network_flags import add_model_arguments
from rulers import RULERS
from rulers.tally import TASKS, Task

T_MODELS = "model_scoring/trained_t_models"
T_MODEL = "best_ternary_cifar_micronet.pt"  # unless the user says another
FP_MODELS = "model_quantization/trained_fp_models"
SAVED_LAYERS = "model_scoring/saved_layers"
DESCRIPTION = """\
Score a network by the rules of the MicroNet Challenge (2019): parameters and operations relative to the task's
baseline. Prints the score on three rulers, with --layers every layer and every group's subtotal, and with --eval
whether the task's accuracy holds.
"""
EPILOG = """\
example: score and evaluate what stage 2 left in its folder, with 16 bit values and additions
  python run_scoring.py --t-model model_quantization/saved_models/Ternary_best_acc.pt --dataset CIFAR100 \\
    --eval --halfprecision --add-bits 16
"""


def _shape(text: str) -> tuple[tuple[int, ...], str | None]:
    """The sides of an input, and its type if it is said."""
    sides, _, dtype = text.partition(":")
    if dtype not in ("", "int64", "int32", "bool", "float32"):
        raise argparse.ArgumentTypeError(f"{text!r} has another type than int64, int32, bool or float32")
    try:
        return tuple(positive_int(side) for side in sides.replace(",", "x").split("x")), dtype or None
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 3x32x32") from None


def _baseline(text: str) -> Task:
    """A task of the challenge by its name, or `PARAMS,OPERATIONS` of one's own."""
    named = {task.key.lower(): task for task in TASKS.values()}
    if task := named.get(text.lower().replace("-", "")):
        return task
    try:
        params, operations = (positive_float(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither {' nor '.join(TASKS)} nor two numbers above 0, PARAMS,OPERATIONS"
        ) from None
    return Task("yours", 0, params, operations, 0, 0)


def parser() -> Parser:
    """Build the parser; defaults are those of the 2019 program, unless the checkpoint or the ruler says otherwise."""
    parser = Parser(prog="run_scoring.py", description=DESCRIPTION, epilog=EPILOG)
    network = add_model_arguments(
        parser,
        "--t-model",
        T_MODEL,
        f"the checkpoint or packed file to score: a path, or a file name in {T_MODELS}",
    )
    network.add_argument(
        "--input-shape",
        action="append",
        type=_shape,
        metavar="CxHxW",
        help="what is counted runs on this instead of an image; once for each argument of the network, without the "
        "batch; 77:int64 for whole numbers",
    )
    network.add_argument(
        "--before",
        metavar="NAME",
        help=f"full-precision checkpoint to show beside it, at 32 bit: a path, or a file name in {FP_MODELS}",
    )

    _add_scoring_arguments(parser)

    evaluation = parser.add_argument_group("evaluation")
    switch(evaluation, "eval", False, "count the right answers on the validation images")
    evaluation.add_argument("--val-batch-size", type=positive_int, default=256, help="validation images a step")

    export = parser.add_argument_group("export")
    switch(export, "save", False, f"write each ternary layer as masks into {SAVED_LAYERS}/NAME")
    switch(export, "pt-sparse", False, f"write them as sparse COO tensors into {SAVED_LAYERS}/NAME_coo")
    export.add_argument("--pack", metavar="FILE", help="write the network as a small .safetensors file")
    export.add_argument(
        "--merge-batch-norm",
        action="store_true",
        help="first turn BatchNorm's means and variances into its factors and summands: smaller files, for inference",
    )
    export.add_argument("--unpack", metavar="FILE", help="write the network as a .pt checkpoint")
    export.add_argument("--onnx", metavar="FILE", help="write it as an ONNX file with symbols for quantized weights")
    export.add_argument(
        "--onnx-opset",
        type=int,
        choices=range(18, 24),
        default=18,
        metavar="N",
        help="ONNX's version of operations, 18 to 23",
    )
    export.add_argument(
        "--shrink",
        action="store_true",
        help="leave dead channels out of the ONNX file, for speed: all but those that fill multiples of 8",
    )

    add_data_arguments(
        parser,
        dataset="the checkpoint's, else ImageNet for 1000 classes, CIFAR10 for 10, CIFAR100",
        image_size="the checkpoint's, else 32; for ImageNet networks 200 (MicroNet) or their own",
    )
    add_machine_arguments(parser, training=False)
    return parser


def _add_scoring_arguments(parser: Parser) -> None:
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument(
        "--accounting", choices=tuple(RULERS), default="challenge", help="the ruler of the detailed listing"
    )
    switch(scoring, "halfprecision", True, "store values that are not ternary with 16 bit, else with 32")
    scoring.add_argument(
        "--mul-bits", type=positive_int, default=16, metavar="BITS", help="width of the inputs of multiplications"
    )
    scoring.add_argument(
        "--add-bits",
        type=positive_int,
        metavar="BITS",
        help="width of the inputs of additions (default: 16 on the published ruler, as in 2019; 32 on the others)",
    )
    scoring.add_argument(
        "--act-bits",
        type=int,
        choices=range(2, 17),
        metavar="BITS",
        help="width of activations, 2 to 16: --eval rounds them to as many, on ranges that some images decide; "
        "challenge and improved count multiplications at it, unless their weights have more bits",
    )
    scoring.add_argument(
        "--prune-threshold",
        type=positive_share,
        default=1.0,
        metavar="T",
        help="first set depthwise weights below T times their layer's largest magnitude to zero; 1 prunes nothing",
    )
    scoring.add_argument(
        "--baseline",
        type=_baseline,
        metavar="NAME|PARAMS,OPS",
        help=f"what scores are relative to: {' or '.join(TASKS)}, or a network of so many parameters and operations "
        "(default: the data set's, else CIFAR-100's)",
    )
    scoring.add_argument("--layers", action="store_true", help="list every layer, and every group's subtotal")
    scoring.add_argument("--strict", action="store_true", help="exit with 2 if an operation has no rule")
    scoring.add_argument("--json", metavar="FILE", help="write everything that is printed, and more, as JSON")
