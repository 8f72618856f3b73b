"""Which of the processes that `torchrun` started this one is, as the environment says. Imports no torch."""

import os


def world_size() -> int:
    """How many processes there are; 1 without `torchrun` (a cluster may set one of its variables for other ends)."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """This process's number; 0 in a single process."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0
