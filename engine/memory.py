"""How much memory a program took at most."""

import resource
import sys

import torch

from engine.report import say

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; macOS counts bytes, other systems KiB
MIB = 2**20


def peak_memory() -> dict[str, int]:
    """The most bytes at once, since the program started.

    `resident` is this process's, `child` that of its largest child process which has ended, such as a worker that
    decoded images (pages that both share count in both), `gpu` what tensors took on the fullest GPU (only where one
    was used).
    """
    own, children = (
        resource.getrusage(who).ru_maxrss * MAXRSS_UNIT for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    peak = {"resident": own, "child": children}
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
    say(f"Peak memory: {', '.join(parts)}")
