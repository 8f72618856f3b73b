"""Where several processes meet: a store at MASTER_ADDR:MASTER_PORT, which `torchrun` or the first process holds.

There they say who is here before they join, and which of them says in the end why all of them end. Of every failure
the others learn here, wherever they wait; of a process that the system killed they learn from their connections.
"""

import atexit
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist

from engine.program.errors import EXIT_LOST, PeerLost, UserError
from engine.program.processes import Place
from engine.program.report import narrate

if TYPE_CHECKING:  # where their types are
    from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
else:
    from torch.distributed import PrefixStore, Store, TCPStore

JOIN_PATIENCE = 300  # seconds until all processes must have come
END_PATIENCE = 3  # seconds that an ending process leaves the others for what they have to say
TRY = 2  # seconds that one answer may take
PAUSE = 0.2  # seconds between two looks

ENDED = "ended"  # the key under which the first process that fails leaves its exit code
LOST = re.compile(r"gloo|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)

_store: Store | None = None


def meet(here: Place, facts: dict[str, str]) -> list[dict[str, str]]:
    """Wait until all processes are here; each brings `facts`. Return all of them, by the number of the process."""
    global _store
    where, deadline = f"{here.address}:{here.port}", time.monotonic() + JOIN_PATIENCE
    narrate(f"Waiting for {here.world_size} processes at {where}")
    store = _store = _reach(here, deadline)
    if store.add(f"number {here.rank}", 1) > 1:
        raise UserError(f"two processes at {where} have RANK={here.rank}: give each its own number, as torchrun does")
    store.set(f"facts {here.rank}", json.dumps(facts))
    while missing := [i for i in range(here.world_size) if not store.check([f"facts {i}"])]:
        if store.check([ENDED]):
            raise PeerLost("it failed before all had come")
        if time.monotonic() > deadline:
            raise UserError(
                f"{here.world_size - len(missing)} of {here.world_size} processes came to {where} within "
                f"{JOIN_PATIENCE} seconds (missing: number {', '.join(map(str, missing[:10]))}); start all of them, "
                f"each with the same command, or fewer with a smaller WORLD_SIZE"
            )
        time.sleep(PAUSE)
    _watch(_another(store))
    return [json.loads(store.get(f"facts {i}")) for i in range(here.world_size)]


def store_of_group() -> Store:
    """Where the processes met, for their process group."""
    assert _store is not None  # they met before
    return PrefixStore("group", _another(_store))


def _another(store: Any) -> Store:
    """A connection of its own to the store: one that waits holds up all that use it. (torch 2.11 lacks the type.)"""
    clone: Store = store.clone()
    return clone


def _is_host(here: Place) -> bool:
    return here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _reach(here: Place, deadline: float) -> Store:
    """Connect to the store, or be its host; UserError if that is not possible until `deadline`."""
    said, began = here.rank == 0, time.monotonic()
    while True:
        try:
            if not _is_host(here):  # torch's own attempts take no signals
                socket.create_connection((here.address, here.port), timeout=TRY).close()
            patience = timedelta(seconds=TRY)
            return TCPStore(here.address, here.port, is_master=_is_host(here), timeout=patience, wait_for_workers=False)
        except (OSError, dist.DistError) as error:
            reason = " ".join(str(error).split())[:200]
        if _is_host(here) and "EADDRINUSE" in reason:
            raise UserError(f"MASTER_PORT {here.port} is taken by another program; pass another port to all processes")
        if time.monotonic() > deadline:
            raise UserError(
                f"no process answered at {here.address}:{here.port} ({reason}); start process 0 there, or correct "
                f"MASTER_ADDR and MASTER_PORT"
            )
        if not said and time.monotonic() > began + TRY:
            said = True
            print(f"Process {here.rank} is waiting for process 0 at {here.address}:{here.port}", flush=True)  # noqa: T201
        time.sleep(PAUSE)


def _watch(store: Store) -> None:
    """From now on, end this process in silence soon after another one said why all end, wherever this one waits."""
    done = threading.Event()

    def watch() -> None:
        with suppress(dist.DistError):  # the host of the store is gone: connections end, too
            while not done.wait(PAUSE):
                if store.check([ENDED]):
                    done.wait(TRY)  # meanwhile it may end by itself
                    _exit(int(store.get(ENDED)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    atexit.register(thread.join)
    atexit.register(done.set)  # the last that is registered runs first


def is_lost(error: BaseException) -> bool:
    """Whether `error` says that another process can't be reached any more."""
    return isinstance(error, PeerLost | dist.DistError) or (
        isinstance(error, RuntimeError) and bool(LOST.search(str(error)))
    )


def end(here: Place, code: int, cause: str | None, say_it: Callable[[], None]) -> NoReturn:
    """End this process with exit `code`; of all that end for the same `cause`, one says it.

    None is the cause if most likely another process failed, or was told to end: that one says it then.
    """
    code, speaks = _announce(here, code, cause)
    if speaks:
        say_it()
    with suppress(dist.DistError):
        if _store and _store.add("left", 1) and _is_host(here):
            deadline = time.monotonic() + END_PATIENCE
            while _store.add("left", 0) < here.world_size and time.monotonic() < deadline:
                time.sleep(PAUSE)
    _exit(code)


def _announce(here: Place, code: int, cause: str | None) -> tuple[int, bool]:
    """Leave word that this process ends; return its exit code, and whether this process is the one that speaks."""
    global _store
    try:
        _store = _another(_store) if _store else _reach(here, time.monotonic() + END_PATIENCE)
        if cause is None:
            if code == EXIT_LOST:
                with suppress(dist.DistError):
                    _store.wait([ENDED], timedelta(seconds=TRY))
            if _store.check([ENDED]):
                return int(_store.get(ENDED)), False
        speaks = _store.add(f"cause {re.sub('[0-9]+', '', cause or '')}", 1) == 1  # whatever port, GPU or size it was
        _store.compare_set(ENDED, "", str(code))
        return code, speaks
    except (UserError, dist.DistError):  # nobody is there who could speak
        _store = None
        return code, True


def _exit(code: int) -> NoReturn:
    """Exit without waiting for the others, as their process group would."""
    for child in multiprocessing.active_children():
        child.terminate()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
