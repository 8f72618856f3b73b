"""Command lines: one-line errors, exit codes, and the arguments that several programs share. Imports no torch."""

import argparse
import importlib
import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from engine import DATASETS, MAX_IMAGE_SIZE, UserError
from model import MODELS

EXIT_BUG = EXIT_OUT_OF_MEMORY = 1
EXIT_WRONG_INPUT = 2
EXIT_NOBODY_READS = 128 + signal.SIGPIPE

MAX_LINE = 2000  # characters; what is said may quote files from anywhere
MAX_INT = 2**31 - 1
MAX_WORKERS = 1024
SECONDS_TO_STOP = 5  # then an interruption is repeated
SECONDS_TO_REPEAT = 0.05

INTERRUPTIONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
OUT_OF_MEMORY = re.compile(
    r"out of memory|can.t allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED|"
    r"worker .*killed by signal: Killed|insufficient shared memory",
    re.IGNORECASE,
)
TOO_SMALL = re.compile(r"Kernel size can.t be greater than actual input|Expected more than 1 value per channel")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help shows every default that there is."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        line = self.line(f"error: {message} (see {self.prog} --help)")
        self.exit(EXIT_WRONG_INPUT, None if _other_process() else line)

    def line(self, message: str) -> str:
        """`message` as one line, whatever the paths in it hold, with the program's name before it."""
        printable = "".join(c if c.isprintable() else "?" for c in " ".join(message.splitlines()))
        name = f"{self.prog} [process {_other_process()}]" if _other_process() else self.prog
        return f"{name}: {printable if len(printable) <= MAX_LINE else printable[:MAX_LINE] + ' ...'}\n"


def _other_process() -> int:
    """Under `torchrun`, the number of this process, unless it is the first one; without importing torch."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return int(os.environ.get("RANK", 0)) if several else 0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default is None or action.default is False and action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


def launch(parser: Parser, program: str) -> None:
    """Parse the command line, call `run(args)` of the module `program`, and exit with the right code.

    0 done; 2 the user's input, or a file on this machine, is wrong; 1 out of memory (one line on stderr each), or,
    with a traceback, a bug; 130 interrupted, 143 terminated; 141 nobody reads the output any more (`| head`).
    """
    args = parser.parse_args()
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    with _interruptions() as caught:
        try:
            code, line = importlib.import_module(program).run(args), None
        except BaseException as error:
            if caught or isinstance(error, KeyboardInterrupt):  # whatever it became on its way up
                code, line = _interruption(caught[0] if caught else signal.SIGINT, args)
            else:
                code, line = _ending(error, args)
                if code == EXIT_BUG and not line:
                    raise
                if isinstance(error, OSError) and error.filename is None:  # perhaps the console took no more
                    with suppress(OSError):  # for what Python flushes on exit
                        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    parser.exit(code, line and parser.line(line))


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """In here Ctrl-C and SIGTERM raise KeyboardInterrupt, and are noted in the list; afterwards they end the process.

    Destructors and the like swallow exceptions: the interruption is then repeated.
    """
    caught = []
    wanted = [number for number in INTERRUPTIONS if signal.getsignal(number) != signal.SIG_IGN]
    unraisable = sys.unraisablehook

    def interrupt(number, frame):
        caught.append(number)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_STOP)
        raise KeyboardInterrupt

    def swallowed(what):
        if caught and what.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_REPEAT)
        else:
            unraisable(what)

    for number in (*wanted, signal.SIGALRM):
        signal.signal(number, interrupt)
    sys.unraisablehook = swallowed
    try:
        yield caught
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = unraisable
        for number in wanted:
            signal.signal(number, signal.SIG_DFL)


def _interruption(number: int, args: argparse.Namespace) -> tuple[int, str]:
    resumable = "; the same command, without --no-resume, continues after the last whole epoch"
    return 128 + number, INTERRUPTIONS[number] + resumable * hasattr(args, "no_resume")


def _ending(error: BaseException, args: argparse.Namespace) -> tuple[int, str | None]:
    """The exit code that an error leads to, and the line that says what to do; no line where it is a bug."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, UserError):
        return EXIT_WRONG_INPUT, f"error: {error}"
    if is_out_of_memory(error):
        smaller = [name for name in ("batch_size", "val_batch_size", "image_size", "workers") if hasattr(args, name)]
        flags = " or ".join(f"--{name.replace('_', '-')}" for name in smaller)
        advice = f"take a smaller {flags}" if flags else "take a smaller network"
        return EXIT_OUT_OF_MEMORY, f"error: out of memory ({text or type(error).__name__}); {advice}"
    if isinstance(error, ValueError | RuntimeError) and TOO_SMALL.search(text):
        return EXIT_WRONG_INPUT, f"error: too small for this network ({text}); take a larger --image-size or batch"
    if isinstance(error, BrokenPipeError):
        return EXIT_NOBODY_READS, None
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f"{error.filename}: "
        return EXIT_WRONG_INPUT, f"error: {where}{error.strerror}; mend that, or pass another path"
    return EXIT_BUG, None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that this machine or its GPU has not enough memory, as Python and torch say it."""
    kinds = (RuntimeError, OSError)
    return isinstance(error, MemoryError) or isinstance(error, kinds) and bool(OUT_OF_MEMORY.search(str(error)))


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


positive_int = _number(int, lambda v: 0 < v <= MAX_INT, "a whole number above 0 (and at most 2147483647)")
nonnegative_int = _number(int, lambda v: 0 <= v <= MAX_INT, "a whole number of 0 or more (and at most 2147483647)")
_pixels = _number(int, lambda v: 0 < v <= MAX_IMAGE_SIZE, f"a whole number above 0 (and at most {MAX_IMAGE_SIZE})")
_workers = _number(int, lambda v: 0 <= v <= MAX_WORKERS, f"a whole number of 0 or more (and at most {MAX_WORKERS})")
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
    group.add_argument("--image-size", type=_pixels, metavar="PX", help=f"side in pixels (default: {image_size})")
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
    group.add_argument("--workers", type=_workers, default=4, metavar="N", help="processes that decode images")
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
