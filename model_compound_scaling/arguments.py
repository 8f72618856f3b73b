"""The command line of `run_compound_scaling.py`."""

import argparse
from collections.abc import Sequence
from typing import Any

from engine.program.arguments import (
    Parser,
    add_data_arguments,
    add_machine_arguments,
    add_objective_arguments,
    add_run_arguments,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
)
from engine.program.network_flags import add_network_arguments

DESCRIPTION = """\
Grid search over compound scaling: train MicroNet(d^phi, w^phi) for every pair of depth and width multipliers; or,
with --model or --init, train any other network in full precision.
The best network ends in SAVE_DIR/best_model.pt; every run keeps its own in a folder beside it.
"""
EPILOG = """\
example: three epochs on scikit-learn's handwritten digits, no download, a few seconds each on a CPU
  python run_compound_scaling.py --dataset digits --image-size 16 --grid 1 1 1.2 1 --phi 1 --epochs 3 --batch-size 64
"""


class _Grid(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        assert values is not None  # nargs is "+"
        if len(values) % 2:
            parser.error(f"argument --grid: {len(values)} numbers are no pairs of depth and width: d1 w1 d2 w2 ...")
        setattr(namespace, self.dest, values)


def parser() -> Parser:
    """Build the parser; every default is that of the 2019 program."""
    parser = Parser(prog="run_compound_scaling.py", description=DESCRIPTION, epilog=EPILOG)
    network = add_network_arguments(parser, "trained as it is, in the place of the grid", scaled=False)
    network.add_argument(
        "--init", metavar="FILE", help="start from this checkpoint, with a new classifier where classes differ"
    )
    grid = parser.add_argument_group("grid")
    grid.add_argument(
        "--grid",
        type=positive_float,
        nargs="+",
        default=[1.4, 1.2],
        action=_Grid,
        metavar="D W",
        help="pairs of depth and width multipliers: d1 w1 d2 w2 ...",
    )
    grid.add_argument("--phi", type=nonnegative_float, default=3.5, help="each pair trains MicroNet(d^phi, w^phi)")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive_int, default=200, help="epochs a grid point")
    training.add_argument("--start-epoch", type=nonnegative_int, default=0, help="epoch at which to begin counting")
    training.add_argument("--batch-size", type=positive_int, default=256, help="training images a step")
    training.add_argument("--val-batch-size", type=positive_int, default=512, help="validation images a step")
    training.add_argument("--lr", type=positive_float, default=0.1, help="initial learning rate")
    training.add_argument("--momentum", type=nonnegative_float, default=0.9, help="Nesterov momentum")
    training.add_argument("--weight-decay", type=nonnegative_float, default=5e-4, help="L2 penalty")

    add_objective_arguments(parser, "the current folder")
    add_data_arguments(
        parser,
        dataset="CIFAR100",
        image_size="32 for the known small images, 224 for photographs, else the images' own",
    )
    add_machine_arguments(parser)
    add_run_arguments(parser, "model_compound_scaling/saved_models")
    return parser
