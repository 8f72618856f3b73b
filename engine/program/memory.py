"""How much memory a program took at most, and what becomes of what it frees."""

import ctypes
import platform
import resource
import sys

import torch

from engine.program.report import narrate

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; macOS counts bytes, other systems KiB
MIB = 2**20
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def _largest(who: int) -> int:
    """Peak resident bytes of this process (RUSAGE_SELF) or of its largest child that has ended (RUSAGE_CHILDREN)."""
    return resource.getrusage(who).ru_maxrss * MAXRSS_UNIT


# `import torch` forks a process for a moment, which counts with all the pages that it shares
OF_IMPORTS = _largest(resource.RUSAGE_CHILDREN)


def keep_freed_memory() -> None:
    """Have the C library keep what tensors free for the next ones (glibc; elsewhere nothing happens).

    By itself it maps each block of more than 32 MiB anew, and unmaps it when it is freed, so that the kernel clears the
    pages of a network's large activations in every step, which can take nearly half of the step's time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # all blocks come from the heap,
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # whose end is never given back


def peak_memory() -> dict[str, int]:
    """The most bytes at once, since the program started.

    `resident` is this process's, `child` that of its largest child process which has ended, such as a worker that
    decoded images (pages that both share count in both), `gpu` what tensors took on the fullest GPU (only where one
    was used).
    """
    children = _largest(resource.RUSAGE_CHILDREN)
    peak = {"resident": _largest(resource.RUSAGE_SELF), "child": children if children > OF_IMPORTS else 0}
    if torch.cuda.is_initialized():
        peak["gpu"] = max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    return peak


def say_peak_memory() -> None:
    """Print `peak_memory` as one line."""
    peak = peak_memory()
    parts = [f"{peak['resident'] / MIB:,.0f} MiB resident"]
    if peak["child"]:
        parts.append(f"{peak['child'] / MIB:,.0f} MiB in the largest child process")
    if "gpu" in peak:
        parts.append(f"{peak['gpu'] / MIB:,.0f} MiB of tensors on a GPU")
    narrate(f"Peak memory: {', '.join(parts)}")
