"""How much memory a program took at most."""

import resource
import sys

import torch

from engine.program.report import narrate

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; macOS counts bytes, other systems KiB
MIB = 2**20


def _largest(who: int) -> int:
    """Peak resident bytes of this process (RUSAGE_SELF) or of its largest child that has ended (RUSAGE_CHILDREN)."""
    return resource.getrusage(who).ru_maxrss * MAXRSS_UNIT


# `import torch` forks a process for a moment, which counts with all the pages that it shares
OF_IMPORTS = _largest(resource.RUSAGE_CHILDREN)


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
