"""Running a program: one-line errors and exit codes. Imports no torch."""

import argparse
import importlib
import io
import os
import re
import signal
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

from engine.program.arguments import Parser
from engine.program.errors import EXIT_LOST, EXIT_WRONG_INPUT, UserError, is_out_of_memory
from engine.program.interruptions import INTERRUPTIONS, end_where_stuck, interruptions
from engine.program.processes import Place, place
from engine.program.report import set_quiet
from model.own import OwnCodeError

EXIT_BUG = EXIT_OUT_OF_MEMORY = 1
EXIT_NOBODY_READS = 128 + signal.SIGPIPE

TOO_SMALL = re.compile(r"Kernel size can.t be greater than actual input|Expected more than 1 value per channel")


def launch(parser: Parser, program: str) -> None:
    """Parse the command line, call `run(args)` of the module `program`, and exit with the right code.

    0 done; 2 the user's input, or a file on this machine, is wrong; 1 out of memory or another process lost (one line
    on stderr each), or, with a traceback, a bug; 130 interrupted, 143 terminated; 141 nobody reads the output any more
    (`| head`). Of several processes one says why they end, and all have its code.
    """
    try:
        here = place()
    except UserError as error:
        parser.exit(EXIT_WRONG_INPUT, parser.line(f"error: {error}"))
    if here:  # torch's own accounts of a lost process are tracebacks
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    args = parser.parse_args()
    set_quiet(args.quiet)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    code, line, cause = 0, None, None
    with interruptions() as caught:
        if here:
            end_where_stuck(lambda number: parser.end(*_interruption(number, args)))
        try:
            importlib.import_module(program).run(args)
        except BaseException as error:
            code, line, cause = _outcome(error, caught, here, args)
            if code == EXIT_BUG and not line:
                if here:
                    _end_with_traceback(here, error)
                raise
            _let_go_of_console(error)
    if code:
        parser.end(code, line, cause)
    parser.exit()


def _outcome(
    error: BaseException, caught: list[int], here: Place | None, args: argparse.Namespace
) -> tuple[int, str | None, str | None]:
    """Exit code, what is said of it, and for which cause, as `meeting.end` has it."""
    if caught or isinstance(error, KeyboardInterrupt):  # whatever it became on its way up
        return _interruption(caught[0] if caught else signal.SIGINT, args)
    if here and _is_lost(error):
        return EXIT_LOST, f"error: another process is lost ({_text(error)}){_go_on(args)}", None
    code, line = _ending(error, args)
    return code, line, line


def _let_go_of_console(error: BaseException) -> None:
    """Where perhaps the console took no more: nothing that Python flushes on exit may raise again."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interruption(number: int, args: argparse.Namespace) -> tuple[int, str, None]:
    """Exit code, line, and no cause: where several processes end, the one that failed or was told to end says why."""
    return 128 + number, INTERRUPTIONS[number] + _go_on(args), None


def _go_on(args: argparse.Namespace) -> str:
    if hasattr(args, "no_resume"):
        return "; the same command, without --no-resume, continues after the last whole epoch"
    return ""


def _is_lost(error: BaseException) -> bool:
    from engine.program import meeting  # not before: it imports torch

    return meeting.is_lost(error)


def _end_with_traceback(here: Place, error: BaseException) -> NoReturn:
    from engine.program import meeting

    meeting.end(here, EXIT_BUG, repr(error), lambda: traceback.print_exception(error))


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _ending(error: BaseException, args: argparse.Namespace) -> tuple[int, str | None]:
    """The exit code that an error leads to, and the line that says what to do; no line where it is a bug."""
    text = _text(error)
    if isinstance(error, UserError | OwnCodeError):
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
