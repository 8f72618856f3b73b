"""The rulers: exact rules that say how many parameters and operations a compressed network counts as.

Importing this package does not import torch, so that command lines are parsed at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from model import ROWS, row_of
from rulers.tally import Tally, Widths

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Ruler:
    """A set of counting rules, the module `rulers.<name>`.

    Attributes:
        name: as `--accounting` knows it.
        add_bits: width of the inputs of additions unless something else is stated, bits.
        families: the families of networks that it knows; None for any network.
    """

    name: str
    add_bits: int
    families: tuple[str, ...] | None = None

    def knows(self, model_name: str) -> bool:
        """Whether the ruler can count the network `model_name`."""
        return self.families is None or row_of(model_name).family in self.families

    @property
    def models(self) -> list[str]:
        """The built-in networks that it knows."""
        return [name for name in ROWS if self.knows(name)]

    def widths(self, value: int = 16, mul: int = 16, add: int | None = None) -> Widths:
        """Bit widths with the ruler's own width of additions unless `add` is stated."""
        return Widths(value, mul, add or self.add_bits)

    def count(self, network: nn.Module, model_name: str, image_size: int | tuple[int, ...], widths: Widths) -> Tally:
        """Count `network`, built as `model_name`, for one image of `image_size` pixels a side, or of that shape.

        ValueError where the ruler does not know the network.
        """
        if not self.knows(model_name):
            raise ValueError(f"the {self.name} ruler has no form for {model_name}, only for {', '.join(self.models)}")
        count = import_module(f"rulers.{self.name}").count
        arguments = (network, image_size) if self.families is None else (network, model_name, image_size)
        with one_thread():
            return count(*arguments, widths)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: on a busy machine, several wait far longer than one takes to count."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_RULERS = (
    Ruler("published", add_bits=16, families=("micronet", "resnet", "efficientnet")),
    Ruler("challenge", add_bits=32),
    Ruler("improved", add_bits=32),
)

RULERS: dict[str, Ruler] = {ruler.name: ruler for ruler in _RULERS}
"""All rulers, by name."""
