"""The command line of `run_scoring.py`."""

from engine.cli import Parser, add_data_arguments, add_machine_arguments, add_model_arguments, positive_int, share, switch

T_MODELS = "model_scoring/trained_t_models"
SAVED_LAYERS = "model_scoring/saved_layers"
DESCRIPTION = """\
Score a network by the rules of the MicroNet Challenge (2019): parameters and operations relative to the task's
baseline. Prints every layer, every group's subtotal, the score, and with --eval whether the task's accuracy holds.
"""
EPILOG = """\
example: score and evaluate what stage 2 left in its folder, with 16 bit values and additions
  python run_scoring.py --t-model model_quantization/saved_models/Ternary_best_acc.pt --dataset CIFAR100 \\
    --eval --halfprecision --add-bits 16
"""


def parser() -> Parser:
    """Build the parser; every default is that of the 2019 program."""
    parser = Parser(prog="run_scoring.py", description=DESCRIPTION, epilog=EPILOG)
    add_model_arguments(parser, "--t-model", f"the checkpoint to score: a path, or a file name in {T_MODELS}")

    scoring = parser.add_argument_group("scoring")
    switch(scoring, "halfprecision", True, "store values that are not ternary with 16 bit, else with 32")
    bits = {"type": positive_int, "default": 16, "metavar": "BITS"}
    scoring.add_argument("--mul-bits", **bits, help="width of the inputs of multiplications")
    scoring.add_argument("--add-bits", **bits, help="width of the inputs of additions")
    scoring.add_argument(
        "--prune-threshold",
        type=share,
        default=1.0,
        metavar="T",
        help="first set depthwise weights below T times their layer's largest magnitude to zero; 1 prunes nothing",
    )

    evaluation = parser.add_argument_group("evaluation")
    switch(evaluation, "eval", False, "count the right answers on the validation images")
    evaluation.add_argument("--val-batch-size", type=positive_int, default=256, help="validation images a step")

    export = parser.add_argument_group("export")
    export.add_argument("--save", action="store_true", help=f"write each ternary layer as bit masks into {SAVED_LAYERS}")
    export.add_argument("--pt-sparse", action="store_true", help="write them as sparse COO tensors instead")

    add_data_arguments(
        parser,
        dataset="the checkpoint's, else ImageNet for 1000 classes, CIFAR10 for 10, CIFAR100",
        image_size="the checkpoint's, else 32; for ImageNet networks 200 (MicroNet) or their own",
    )
    add_machine_arguments(parser)
    return parser
