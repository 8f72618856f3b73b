"""Ctrl-C and SIGTERM, neither lost nor in the middle of something that must be whole. Imports no torch."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_TO_STOP = 5  # then an interruption is repeated
SECONDS_TO_REPEAT = 0.05

INTERRUPTIONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


@contextmanager
def interruptions() -> Iterator[list[int]]:
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


@contextmanager
def signals_held() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the block ends; worker processes started inside ignore SIGINT.

    An exception that a signal's handler raises in the middle of a fork would be lost.
    """
    held = []
    handlers = {number: signal.getsignal(number) for number in INTERRUPTIONS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for arguments in held[:1]:
            handlers[arguments[0]](*arguments)
