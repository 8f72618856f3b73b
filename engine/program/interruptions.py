"""Ctrl-C and SIGTERM, neither lost nor in the middle of something that must be whole. Imports no torch."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS_TO_STOP = 5  # then an interruption is repeated
SECONDS_TO_REPEAT = 0.05
SECONDS_TO_END = 8  # then a process that waits for others is ended, wherever it waits

INTERRUPTIONS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """In here Ctrl-C and SIGTERM raise KeyboardInterrupt, and are noted in the list; afterwards they end the process.

    Destructors and the like swallow exceptions: the interruption is then repeated.
    """
    caught: list[int] = []
    wanted = [number for number in INTERRUPTIONS if signal.getsignal(number) != signal.SIG_IGN]
    unraisable = sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_STOP)
        raise KeyboardInterrupt

    def swallowed(what: "sys.UnraisableHookArgs") -> None:
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


def end_where_stuck(end: Callable[[int], None]) -> None:
    """Call `end(number)`, in a thread, some seconds after an interruption that this process outlives.

    A handler runs only between two steps of Python; this is for processes that wait for each other inside of torch.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while (number := os.read(reading, 1)[0]) not in INTERRUPTIONS:
            pass
        time.sleep(SECONDS_TO_END)
        end(number)

    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # workers take signals of their own
    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def signals_held() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the block ends; worker processes started inside ignore SIGINT.

    An exception that a signal's handler raises in the middle of a fork would be lost.
    """
    held: list[tuple[int, FrameType | None]] = []
    present = {number: signal.getsignal(number) for number in INTERRUPTIONS}
    handlers = {number: handler for number, handler in present.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for caught, frame in held[:1]:
            handlers[caught](caught, frame)
