"""Which layers of a network EC2T ternarizes, and which entropy-constrained pruning prunes."""

from torch import Tensor, nn

from model import EFFICIENTNETS, LITES

_EFFICIENTNET_TERNARY = ("_expand_conv.weight", "_project_conv.weight", "_conv_head.weight")
_EFFICIENTNET_PRUNED = ("_fc.weight", "_se_expand.weight", "_se_reduce.weight")


def _in_block_convolution(name: str) -> bool:
    return ".conv" in name and name.endswith(".weight")


def ternary_candidates(network: nn.Module, model: str) -> list[str]:
    """Names of the weights that EC2T ternarizes, in the network's order.

    Every convolution inside the blocks of MicroNet and ResNet; expand, project and head convolutions of
    EfficientNet and EfficientNet-Lite.
    """
    if model in EFFICIENTNETS + LITES:
        return [name for name, _ in network.named_parameters() if name.endswith(_EFFICIENTNET_TERNARY)]
    return [name for name, _ in network.named_parameters() if _in_block_convolution(name)]


def pruning_candidates(network: nn.Module, model: str) -> list[str]:
    """Names of the weights that `--do-prune` prunes, in the network's order, unless they are ternary already.

    EfficientNet: classifier and squeeze-and-excitation, which EfficientNet-Lite lacks; other networks: the
    convolutions inside the blocks.
    """
    if model in EFFICIENTNETS + LITES:
        names = [name for name, _ in network.named_parameters() if name.endswith(_EFFICIENTNET_PRUNED)]
    else:
        names = ternary_candidates(network, model)
    weights = dict(network.named_parameters())
    return [name for name in names if not is_ternary(weights[name])]


def is_ternary(weight: Tensor) -> bool:
    """Whether `weight` holds no other values than zero, one positive and one negative value."""
    weight = weight.detach()
    return all(side.numel() == 0 or bool((side == side[0]).all()) for side in (weight[weight > 0], weight[weight < 0]))
