"""`--merge-batch-norm`."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def merge_batch_norm(network: nn.Module) -> None:
    """Turn each BatchNorm's mean and variance into its factor and summand, in place: in inference it computes the same.

    The means are 0 then and the variances 1, which a packed file keeps in a few bytes: two numbers a channel are left
    of four, and rounding touches half as many. Training such a network would start from other factors. Layers without
    running statistics or without factors stay as they are.
    """
    for norm in network.modules():
        if isinstance(norm, _BatchNorm) and norm.affine and norm.running_mean is not None:
            assert norm.running_var is not None
            mean, variance = norm.running_mean.double(), norm.running_var.double()
            factor = norm.weight.double() / (variance + norm.eps).sqrt()
            norm.bias.copy_(norm.bias.double() - mean * factor)
            norm.weight.copy_(factor * (1 + norm.eps) ** 0.5)
            norm.running_mean.zero_()
            norm.running_var.fill_(1)
