"""The parser of a command line, arguments that several programs share, and their types. Imports no torch."""

import argparse
import difflib
import math
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from engine.images.datasets import AUGMENTATIONS, DATA_PATH, DATASETS, MAX_IMAGE_SIZE
from engine.program.errors import EXIT_WRONG_INPUT, printable
from engine.program.processes import place

MAX_LINE = 2000  # characters; what is said may quote files from anywhere
MAX_INT = 2**31 - 1
MAX_WORKERS = 1024

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help shows every default that there is."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, fromfile_prefix_chars="@", **kwargs)
        self.add_argument("--version", action="version", version=f"EC2T {version()}")
        self.add_argument("--quiet", action="store_true", help="print results and warnings alone")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The arguments of a line of a file `@FILE`: as in a shell, a `#` begins a comment."""
        return shlex.split(arg_line, comments=True)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^(argument --[\w-]+)/[^:]*:", r"\1:", message)  # without the flag's shorter names
        line = f"error: {message}{_meant(message)} (see {self.prog} --help)"
        self.end(EXIT_WRONG_INPUT, line, cause=line)

    def end(self, code: int, line: str | None, cause: str | None) -> NoReturn:
        """Exit, with a line on stderr; of several processes that end for the same `cause` one says it."""
        here = place()
        if here is None:
            self.exit(code, line and self.line(line))
        from engine.program import meeting  # not before: it imports torch

        rank = here.rank

        def say_it() -> None:
            if line:
                print(self.line(line, rank), end="", file=sys.stderr)  # noqa: T201

        meeting.end(here, code, cause, say_it)

    def line(self, message: str, process: int = 0) -> str:
        """`message` as one line, whatever the paths in it hold, with the program's name before it."""
        line = printable(" ".join(message.splitlines()))
        name = f"{self.prog} [process {process}]" if process else self.prog
        return f"{name}: {line if len(line) <= MAX_LINE else line[:MAX_LINE] + ' ...'}\n"


def version() -> str:
    """Of this toolkit, as its pyproject.toml has it."""
    with open(Path(__file__).parents[2] / "pyproject.toml", "rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def _meant(message: str) -> str:
    """What a user may have meant who wrote a name wrong, as far as `message` tells."""
    if not (wrong := re.search(r"(?:invalid choice|unknown model):? '([^']*)' \(choose from (.*)\)", message)):
        return ""
    choices = {choice.strip(" '").lower(): choice.strip(" '") for choice in wrong[2].split(",")}
    near = difflib.get_close_matches(wrong[1].lower(), choices, n=1)
    return f"; did you mean {choices[near[0]]}?" if near else ""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or (action.default is False and action.nargs == 0):
            return action.help
        return super()._get_help_string(action)


def _number(convert: Callable[[str], Number], accept: Callable[[Number], bool], wanted: str) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            value = convert(text)
            valid = math.isfinite(value) and accept(value)
        except (ValueError, OverflowError):
            valid = False
        if not valid:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


positive_int = _number(int, lambda v: 0 < v <= MAX_INT, "a whole number above 0 (and at most 2147483647)")
nonnegative_int = _number(int, lambda v: 0 <= v <= MAX_INT, "a whole number of 0 or more (and at most 2147483647)")
_pixels = _number(int, lambda v: 0 < v <= MAX_IMAGE_SIZE, f"a whole number above 0 (and at most {MAX_IMAGE_SIZE})")
_workers = _number(int, lambda v: 0 <= v <= MAX_WORKERS, f"a whole number of 0 or more (and at most {MAX_WORKERS})")
positive_float = _number(float, lambda v: v > 0, "a number above 0")
nonnegative_float = _number(float, lambda v: v >= 0, "a number of 0 or more")
fraction = _number(float, lambda v: 0 <= v < 1, "a number from 0 up to, but not, 1")
percent = _number(float, lambda v: 0 <= v <= 100, "a number from 0 to 100")
share = _number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
positive_share = _number(float, lambda v: 0 < v <= 1, "a number above 0, and at most 1")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def truth(text: str) -> bool:
    """Parse `True` or `False`, in any case, or 1 or 0."""
    if (lower := text.lower()) not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not True or False")
    return lower in ("true", "1")


def add_data_arguments(parser: Parser, dataset: str, image_size: str, training: bool = True) -> argparse._ArgumentGroup:
    """Add the arguments that say which images are wanted; `dataset` and `image_size` say what the defaults are."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        choices=DATASETS,
        metavar="NAME",
        help=f"one of {', '.join(DATASETS)} (default: {dataset})",
    )
    group.add_argument(
        "--data-path",
        default=DATA_PATH,
        metavar="DIR",
        help="folder with train/ and val/ or test/ class folders, Tiny-ImageNet-200 as it comes, .npz files, or where "
        "torchvision keeps or downloads the set",
    )
    group.add_argument(
        "--split", choices=("val", "test"), help="the validation images, where both folders are there (default: val)"
    )
    if training:
        group.add_argument(
            "--holdout",
            type=fraction,
            default=0.0,
            metavar="SHARE",
            help="choose epochs and networks on this share of each class's training images, and report the validation "
            "images once, at the end (default: choose on the validation images, as published)",
        )
        group.add_argument(
            "--augment-as",
            choices=AUGMENTATIONS,
            default="published",
            help="of small images: as published for the data set; with flips and padded crops alone (CIFAR10); with "
            "ColorJitter and Cutout as well (CIFAR100; for CIFAR10 this is the authors' follow-up)",
        )
    group.add_argument("--image-size", type=_pixels, metavar="PX", help=f"side in pixels (default: {image_size})")
    return group


def add_machine_arguments(parser: Parser, training: bool = True) -> argparse._ArgumentGroup:
    """Add the arguments that say where and, for programs with `training`, how a program computes."""
    group = parser.add_argument_group("machine")
    switch(group, "cuda", True, "use the GPUs that CUDA_VISIBLE_DEVICES names")
    group.add_argument("--workers", type=_workers, default=cores(), metavar="N", help="processes that decode images")
    if training:
        group.add_argument(
            "--amp",
            choices=("auto", "bf16", "fp16", "off"),
            default="auto",
            help="mixed precision: bfloat16 or float16, what the hardware is fastest in, or 32 bit throughout",
        )
        switch(group, "compile", False, "compile the network with torch.compile: slow start, faster steps")
        group.add_argument(
            "--cuda-graphs",
            dest="graphs",
            action="store_true",
            help="replay each training step as one CUDA graph: for small networks, whose steps are bound by launches",
        )
    return group


def add_objective_arguments(parser: Parser, folder: str) -> argparse._ArgumentGroup:
    """Add the arguments that say what training minimises; `folder` is where a teacher's bare file name is looked up."""
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--teacher",
        metavar="NAME",
        help=f"distil from this checkpoint, a path or a file name in {folder}, or from the network itself before "
        "training: self",
    )
    group.add_argument(
        "--teacher-model", metavar="MODULE:FUNCTION", help="its builder, where it is another one of your own"
    )
    group.add_argument(
        "--teacher-weight",
        type=positive_share,
        default=1.0,
        metavar="W",
        help="the loss is (1 - W) * cross-entropy + W * T^2 * the Kullback-Leibler divergence from the teacher",
    )
    group.add_argument("--temperature", type=positive_float, default=1.0, metavar="T", help="of that divergence")
    switch(group, "freeze-batch-norm", False, "keep BatchNorm's running statistics, and normalise by them")
    group.add_argument(
        "--cutmix",
        type=share,
        default=0.0,
        metavar="P",
        help="the probability that CutMix pastes a box of another image into each of a batch (default: %(default)s)",
    )
    return group


def switch(group: argparse._ArgumentGroup, name: str, default: bool, description: str) -> None:
    """Add the pair `--name` / `--no-name`."""
    group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=description)


def add_run_arguments(parser: Parser, save_dir: str) -> argparse._ArgumentGroup:
    """Add the arguments that say where a run is kept and whether an earlier one is continued."""
    group = parser.add_argument_group("runs")
    group.add_argument("--save-dir", default=save_dir, metavar="DIR", help="where results and runs are kept")
    resume = group.add_mutually_exclusive_group()
    resume.add_argument(
        "--resume",
        metavar="PATH",
        help="continue from this last.pt of a run with the same arguments in another folder (one in SAVE_DIR is "
        "continued without this flag)",
    )
    resume.add_argument("--no-resume", action="store_true", help="start afresh, also where an earlier run could go on")
    group.add_argument(
        "--seed",
        type=nonnegative_int,
        nargs="+",
        default=[0],
        help="of all random draws; with several, everything is trained at each, and the table has means and deviations",
    )
    group.add_argument(
        "--tensorboard", action="store_true", help="note every epoch for TensorBoard, in the run's events/"
    )
    group.add_argument("--list", action="store_true", help="list the runs in SAVE_DIR, and what differs, and stop")
    return group
