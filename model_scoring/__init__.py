"""Stage 3: count a network's parameters and operations by exact rules, evaluate it, export it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_scoring.packing import pack, unpack

__all__ = ["pack", "unpack"]


def __getattr__(name: str) -> Any:
    """Import torch no earlier than it is needed: command lines are parsed at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from model_scoring import packing

    return getattr(packing, name)
