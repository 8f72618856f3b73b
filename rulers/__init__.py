"""The rulers: exact rules that say how many parameters and operations a compressed network counts as.

Importing this package does not import torch, so that command lines are parsed at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from model import ROWS, row_of
from rulers.tally import Tally, Widths

if TYPE_CHECKING:
    from torch import nn


class StatedWidths(TypedDict, total=False):
    """Bits of stored values, of the inputs of multiplications and of additions, and of activations."""

    value: int
    mul: int
    add: int | None
    act: int | None


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

    def widths(self, value: int = 16, mul: int = 16, add: int | None = None, act: int | None = None) -> Widths:
        """Bit widths with the ruler's own width of additions unless `add` is stated."""
        return Widths(value, mul, add or self.add_bits, None if self.families else act)

    def count(self, network: nn.Module, model_name: str, shapes: Any, widths: Widths) -> Tally:
        """Count `network`, built as `model_name`, for one input of `shapes`, as `count` has it.

        ValueError where the ruler does not know the network.
        """
        if not self.knows(model_name):
            raise ValueError(f"the {self.name} ruler has no form for {model_name}, only for {', '.join(self.models)}")
        return _count(network, model_name, shapes, {self.name: widths})[self.name]


def count(network: nn.Module, shapes: Any, model_name: str = "", **widths: Unpack[StatedWidths]) -> dict[str, Tally]:
    """Count a network on every ruler that knows it; it is run once, and is afterwards what it was.

    Args:
        network: any network; its parameters, buffers and masks are counted as they are.
        shapes: of its input, without the batch, such as (3, 224, 224); or the side of an RGB image in pixels; or, for
            a forward with several arguments, a list of shapes or of example tensors (with a batch of 1).
        model_name: of a built-in network, which the `published` ruler may know.
        widths: `value`, `mul` and `add`, of stored values and the inputs of multiplications and additions, bits, 16
            unless stated (`add`: each ruler's own), and `act` as `tally.Widths` has it.

    Returns the tally of each ruler, by its name. What has no rule stands in `Tally.uncounted`: the totals lack it.
    Errors of the network's own code pass through; ValueError where its weights have no values.

    A convolution of 8 filters of 3 x 3 x 3, ReLU, and a linear layer from 8 averages to 10 classes:

    >>> import rulers
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    >>> tally = rulers.count(net, (3, 32, 32), value=32)["challenge"]
    >>> tally.total_scoring_params  # 27 * 8 + 8 and 8 * 10 + 10
    314.0
    >>> {group.name: (int(group.total("mults")), int(group.total("adds"))) for group in tally.groups[:2]}
    {'convolutions': (194400, 194400), 'linear layers': (80, 80)}
    >>> tally.total_mflop, tally.uncounted  # multiplications of 16 bit are half operations
    (0.302516, [])
    """
    of_rulers = {
        ruler.name: ruler.widths(**widths)
        for ruler in RULERS.values()
        if ruler.families is None or (model_name and ruler.knows(model_name) and _side(shapes))
    }
    return _count(network, model_name, shapes, of_rulers)


def _count(network: nn.Module, model_name: str, shapes: Any, widths: dict[str, Widths]) -> dict[str, Tally]:
    """The tallies of the rulers that `widths` has, from one run of the network."""
    from rulers import challenge

    tallies, graph = {}, None
    with one_thread():
        for name, bits in widths.items():
            module = import_module(f"rulers.{name}")
            if RULERS[name].families is None:
                graph = graph or challenge.analysed(network, shapes)
                tallies[name] = module.count(graph, shapes, bits)
            else:
                tallies[name] = module.count(network, model_name, _side(shapes), bits)
    return tallies


def _side(shapes: Any) -> int | None:
    """The height and width of an RGB image, None where `shapes` is something else."""
    if isinstance(shapes, list) and len(shapes) == 1:
        return _side(shapes[0])
    if isinstance(shapes, tuple):
        return shapes[1] if shapes == (3, shapes[-1], shapes[-1]) else None
    return shapes if isinstance(shapes, int) else None


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
