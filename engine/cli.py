"""Command lines: one-line errors, exit codes, and the arguments that several programs share. Imports no torch."""

import argparse
import importlib
import math
import os
import signal
import sys

from engine import DATASETS, UserError
from model import MODELS

EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_NOBODY_READS = 128 + signal.SIGPIPE


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help shows every default that there is."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(EXIT_WRONG_INPUT, self.line(f"error: {message} (see {self.prog} --help)"))

    def line(self, message: str) -> str:
        """`message` as one line, whatever the paths in it hold, with the program's name before it."""
        return f"{self.prog}: {' '.join(message.splitlines())}\n"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default is None or action.default is False and action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


def launch(parser: Parser, program: str) -> None:
    """Parse the command line, call `run(args)` of the module `program`, and exit with the right code.

    0 done; 2 the user's input, or a file on this machine, is wrong (one line on stderr); 130 interrupted;
    141 nobody reads the output any more (`| head`); 1 with a traceback: a bug.
    """
    args = parser.parse_args()
    try:
        sys.exit(importlib.import_module(program).run(args))
    except UserError as error:
        parser.exit(EXIT_WRONG_INPUT, parser.line(f"error: {error}"))
    except KeyboardInterrupt:
        resumable = "; the same command, without --no-resume, continues after the last whole epoch"
        parser.exit(EXIT_INTERRUPTED, parser.line(f"interrupted{resumable if hasattr(args, 'no_resume') else ''}"))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes on exit
        sys.exit(EXIT_NOBODY_READS)
    except OSError as error:
        if error.filename is None:
            raise
        message = f"error: {error.filename}: {error.strerror}; mend that, or pass another path"
        parser.exit(EXIT_WRONG_INPUT, parser.line(message))


def _number(convert, accept, wanted: str):
    def parse(text: str):
        try:
            value = convert(text)
            valid = math.isfinite(value) and accept(value)
        except (ValueError, OverflowError):
            valid = False
        if not valid:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


positive_int = _number(int, lambda v: v > 0, "a whole number above 0")
nonnegative_int = _number(int, lambda v: v >= 0, "a whole number of 0 or more")
positive_float = _number(float, lambda v: v > 0, "a number above 0")
nonnegative_float = _number(float, lambda v: v >= 0, "a number of 0 or more")
fraction = _number(float, lambda v: 0 <= v < 1, "a number from 0 up to, but not, 1")
share = _number(float, lambda v: 0 < v <= 1, "a number above 0, and at most 1")


def add_data_arguments(parser: Parser, dataset: str, image_size: str) -> argparse._ArgumentGroup:
    """Add `--dataset`, `--data-path` and `--image-size`; the other arguments say what the defaults are."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        choices=DATASETS,
        metavar="NAME",
        help=f"one of {', '.join(DATASETS)} (default: {dataset})",
    )
    group.add_argument(
        "--data-path",
        default="../data",
        metavar="DIR",
        help="folder with train/ and val/ or test/ class folders, or where torchvision keeps or downloads the set",
    )
    group.add_argument("--image-size", type=positive_int, metavar="PX", help=f"side in pixels (default: {image_size})")
    return group


def _known_model(text: str) -> str:
    if text not in MODELS:
        raise argparse.ArgumentTypeError(f"unknown model {text!r} (choose from {', '.join(MODELS)})")
    return text


def _own_or_known_model(text: str) -> str:
    return text if ":" in text else _known_model(text)


def add_model_arguments(
    parser: Parser, checkpoint: str, description: str, own: bool = False, pretrained: bool = False
) -> argparse._ArgumentGroup:
    """Add the checkpoint's argument, and `--model`, `--dw-multps`, `--phi`, which it makes superfluous.

    With `own`, `--model` also takes the user's own builder, `module:function`. With `pretrained`, the flag of that
    name stands in for the checkpoint.
    """
    group = parser.add_argument_group("network")
    if pretrained:
        source = group.add_mutually_exclusive_group(required=True)
        source.add_argument(checkpoint, metavar="NAME", help=description)
        source.add_argument("--pretrained", action="store_true", help="--model's published ImageNet weights instead")
    else:
        group.add_argument(checkpoint, required=True, metavar="NAME", help=description)
    group.add_argument(
        "--model",
        type=_own_or_known_model if own else _known_model,
        metavar="NAME",
        help=f"one of {', '.join(MODELS)}{', or your own builder, module:function' * own}; "
        "the checkpoint knows, and a contradiction is an error",
    )
    group.add_argument(
        "--dw-multps", type=positive_float, nargs=2, metavar=("D", "W"), help="depth and width multipliers, likewise"
    )
    group.add_argument("--phi", type=nonnegative_float, help="their exponent: MicroNet(d^phi, w^phi), likewise")
    return group


def add_machine_arguments(parser: Parser, amp: str = "auto") -> argparse._ArgumentGroup:
    """Add the arguments that say where and how a program computes; `amp` is the default of `--amp`."""
    group = parser.add_argument_group("machine")
    switch(group, "cuda", True, "use the GPUs that CUDA_VISIBLE_DEVICES names")
    group.add_argument("--workers", type=nonnegative_int, default=4, metavar="N", help="processes that decode images")
    group.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default=amp,
        help="mixed precision: bfloat16 or float16, what the hardware is fastest in, or 32 bit throughout",
    )
    switch(group, "compile", False, "compile the network with torch.compile: slow start, faster steps")
    return group


def switch(group, name: str, default: bool, description: str) -> None:
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
        help="continue from this run's last.pt (without it, an earlier run with the same arguments is continued)",
    )
    resume.add_argument("--no-resume", action="store_true", help="start afresh, also where an earlier run could go on")
    group.add_argument("--seed", type=nonnegative_int, default=0, help="of all random draws")
    return group
