"""Which layers of a network are quantized or pruned: as its row says, else by type, else as patterns of names say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from model.registry import row_of

TERNARY = 2  # bits
T = TypeVar("T")


class NoSuchLayer(ValueError):
    """A pattern that no layer's name matches."""


@dataclass(frozen=True)
class Patterns:
    """What the user says of layers, as patterns (`fnmatch`) of the names of weights or of their modules.

    Attributes:
        layers: those that are chosen; of none, the network's own choice is taken.
        without: those that are left out of it.
        bits: the widths of those that are not ternary; where several patterns match, the last one counts.
        g: the entropy constraints of those that take another than the pair's, likewise.
    """

    layers: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    bits: tuple[tuple[str, int], ...] = ()
    g: tuple[tuple[str, float], ...] = ()


def ternary_candidates(network: nn.Module, model: str, ran: Sequence[nn.Module] = ()) -> list[str]:
    """Names of the weights that EC2T quantizes unless patterns say otherwise, in the network's order.

    Those that the row of `model` has; of a network of the user's own the inner layers among the modules that `ran` in
    this order.
    """
    if row_of(model).quantize:
        return _matching(dict(network.named_parameters()), row_of(model).quantize)
    return inner_layers(network, ran)


def inner_layers(network: nn.Module, ran: Sequence[nn.Module]) -> list[str]:
    """Names of the weights of convolutions and linear layers in `ran`, without the first, the last, depthwise ones."""
    weights = [weight for module in ran for weight in _weights(module)]
    inner = {id(weight) for weight in weights[1:-1]} - {id(module.weight) for module in ran if is_depthwise(module)}
    return [name for name, parameter in network.named_parameters() if id(parameter) in inner]


def pruning_candidates(network: nn.Module, model: str, ran: Sequence[nn.Module] = ()) -> list[str]:
    """Names of the weights that `--do-prune` prunes unless patterns say otherwise; ternary ones stay as they are."""
    weights = dict(network.named_parameters())
    names = _matching(weights, row_of(model).prune) or ternary_candidates(network, model, ran)
    return [name for name in names if not is_ternary(weights[name])]


def chosen(network: nn.Module, candidates: list[str], patterns: Patterns) -> dict[str, int]:
    """The weights that `patterns` choose, in the network's order: the bits of each by its name.

    Without patterns these are the `candidates`, with 2 bits; a pattern may name any parameter of more than one
    dimension. NoSuchLayer where one matches none.
    """
    weights = {name: p for name, p in network.named_parameters() if p.ndim > 1 and p.is_floating_point()}
    for pattern in (*patterns.layers, *patterns.without):
        if not _matching(weights, (pattern,)):
            raise NoSuchLayer(f"no layer's name matches {pattern!r} (there are {', '.join(weights)})")
    names = _matching(weights, patterns.layers) if patterns.layers else candidates
    left_out = set(_matching(weights, patterns.without))
    return overridden({name: TERNARY for name in names if name not in left_out}, patterns.bits)


def overridden(values: dict[str, T], said: Iterable[tuple[str, T]]) -> dict[str, T]:
    """`values` by layers' names, with those that are `said` of patterns; the last that matches counts.

    NoSuchLayer where a pattern matches no name.
    """
    values = dict(values)
    for pattern, value in said:
        matched = _matching(values, (pattern,))
        if not matched:
            raise NoSuchLayer(f"no chosen layer's name matches {pattern!r} (there are {', '.join(values)})")
        values |= dict.fromkeys(matched, value)
    return values


def _matching(weights: Iterable[str], patterns: Sequence[str]) -> list[str]:
    def matches(name: str) -> bool:
        return any(fnmatchcase(name, p) or fnmatchcase(name.rpartition(".")[0], p) for p in patterns)

    return [name for name in weights if matches(name)]


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """The weights of a convolution, a linear layer or an attention, which runs its output's layer by itself."""
    if isinstance(module, _ConvNd | nn.Linear):
        yield module.weight
    elif isinstance(module, nn.MultiheadAttention):
        projections = (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        yield from (weight for weight in (*projections, module.out_proj.weight) if weight is not None)


def is_depthwise(module: nn.Module) -> bool:
    """Whether `module` is a convolution that sees one channel at a time."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


def is_ternary(weight: Tensor) -> bool:
    """Whether `weight` holds no other values than zero, one positive and one negative value."""
    weight = weight.detach()
    return all(side.numel() == 0 or bool((side == side[0]).all()) for side in (weight[weight > 0], weight[weight < 0]))
