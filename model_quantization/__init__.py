"""Stage 2: entropy-constrained trained ternarization (EC2T), and entropy-constrained pruning."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_quantization.in_python import EC2T

__all__ = ["EC2T"]


def __getattr__(name: str) -> Any:
    """Import torch no earlier than it is needed: command lines are parsed at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from model_quantization import in_python

    return getattr(in_python, name)
