"""Which layers of a network EC2T ternarizes, and which entropy-constrained pruning prunes."""

from fnmatch import fnmatchcase

from torch import Tensor, nn

from model.registry import row_of


def ternary_candidates(network: nn.Module, model: str) -> list[str]:
    """Names of the weights that EC2T ternarizes, in the network's order, as the row of `model` has them."""
    return _matching(network, row_of(model).quantize)


def pruning_candidates(network: nn.Module, model: str) -> list[str]:
    """Names of the weights that `--do-prune` prunes, in the network's order, unless they are ternary already."""
    weights = dict(network.named_parameters())
    return [name for name in _matching(network, row_of(model).prune) if not is_ternary(weights[name])]


def _matching(network: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    names = [name for name, _ in network.named_parameters()]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def is_ternary(weight: Tensor) -> bool:
    """Whether `weight` holds no other values than zero, one positive and one negative value."""
    weight = weight.detach()
    return all(side.numel() == 0 or bool((side == side[0]).all()) for side in (weight[weight > 0], weight[weight < 0]))
