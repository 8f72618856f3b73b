"""`--prune-threshold`."""

from torch import nn


def prune_depthwise(network: nn.Module, threshold: float) -> None:
    """Set depthwise weights smaller than `threshold` times their layer's largest to zero, in place.

    Magnitudes are meant. A threshold of 1 means no pruning.
    """
    if threshold == 1:
        return
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            magnitude = module.weight.detach().abs()
            module.weight.detach()[magnitude < threshold * magnitude.max()] = 0
