"""The formulas of EC2T, each once (Marban et al., arXiv:2004.01077).

All functions are elementwise over layers: `[L]` is a float64 tensor with one number a layer. A layer's weights w
fall in three clusters, with centroids w_p > 0, 0 and -w_n < 0; cluster sizes are numbers of weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CENTROID_FLOOR = 0.675  # of the standard deviation of the layer's weights
MIN_P_0 = 0.5  # zero is always the cheapest cluster
TINY = 1e-30  # stands for the probability of an empty cluster


class Extent(NamedTuple):
    """What EC2T needs to know of each layer's weights, all `[L]`.

    `max` is max(0, w), `min` is min(0, w): a one-sided layer has no extent on its other side.
    """

    max: Tensor
    min: Tensor
    std: Tensor
    numel: Tensor


def initial_centroids(extent: Extent, s: float) -> tuple[Tensor, Tensor]:
    """w_p = s*|max w| and w_n = s*|min w|, both `[L]`."""
    return s * extent.max, s * -extent.min


def bounded_centroids(w_p: Tensor, w_n: Tensor, extent: Extent) -> tuple[Tensor, Tensor]:
    """Keep both centroids at 0.675*std(w) or more, and within the layer's weights.

    The upper bound is ours. It acts on degenerate layers only, and with it no cluster that has weights on its
    side of zero can ever become empty (for g < 1; see `thresholds`).
    """
    floor = CENTROID_FLOOR * extent.std
    return w_p.maximum(floor).minimum(extent.max), w_n.maximum(floor).minimum(-extent.min)


def probabilities(n_p: Tensor, n_n: Tensor, numel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P_p, P_0, P_n `[L]` from the sizes of the nearest-centroid clusters.

    P_0 is raised to at least 0.5, and the others shrink in proportion, so that the three sum to 1.
    """
    p_p, p_n = n_p / numel, n_n / numel
    p_0 = 1 - p_p - p_n
    shrink = torch.where(p_0 < MIN_P_0, (1 - MIN_P_0) / (p_p + p_n), 1.0)
    return p_p * shrink, p_0.clamp(min=MIN_P_0), p_n * shrink


def information(p: Tensor) -> Tensor:
    """I = -log2 P in bits; a large finite number for an empty cluster."""
    return -torch.log2(p.clamp(min=TINY))


def layer_factor(numel: Tensor, sustain: float = 0.0) -> Tensor:
    """delta `[L]`: a layer's size relative to the largest ternarized layer's; `sustain` is sigma of the later form."""
    return (numel / numel.max() + sustain) / (1 + sustain)


def lagrangian(w_p: Tensor, w_n: Tensor, di_p: Tensor, di_n: Tensor, extent: Extent, strength: Tensor) -> Tensor:
    """lambda = g * delta * min(lambda_n, lambda_p), `[L]`; `strength` is g * delta, `di_c` is I_c - I_0.

    At lambda_c the outermost weight of cluster c would leave it. A side without weights has no say;
    lambda is 0 for a layer of zeros.
    """

    def at_which_vanishes(outermost: Tensor, centroid: Tensor, di: Tensor) -> Tensor:
        gain = outermost**2 - (centroid - outermost) ** 2
        return torch.where(outermost > centroid / 2, gain / di.clamp(min=TINY), torch.inf)

    limit = at_which_vanishes(extent.max, w_p, di_p).minimum(at_which_vanishes(-extent.min, w_n, di_n))
    return torch.where(limit.isinf(), 0.0, strength * limit)


def thresholds(
    w_p: Tensor, w_n: Tensor, n_p: Tensor, n_n: Tensor, extent: Extent, strength: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The assignment as two thresholds: a = +1 exactly where w > t_p, a = -1 exactly where w < -t_n, else 0.

    Minimising (w - c)^2 + lambda * I_c over the three centroids c and expanding the squares gives
    t_c = w_c / 2 + lambda * (I_c - I_0) / (2 * w_c). All arguments and results are `[L]`; n_p and n_n are the sizes
    of the nearest-centroid clusters; the third result is lambda. A centroid of 0 has no cluster: t = inf.

    Since lambda <= g * lambda_c, t_c <= w_c / 2 + g * (m_c - w_c / 2) < m_c for g < 1, with m_c the outermost weight:
    the cluster keeps at least that one.
    """
    p_p, p_0, p_n = probabilities(n_p, n_n, extent.numel)
    di_p, di_n = information(p_p) - information(p_0), information(p_n) - information(p_0)
    lam = lagrangian(w_p, w_n, di_p, di_n, extent, strength)

    def threshold(centroid: Tensor, di: Tensor) -> Tensor:
        return torch.where(centroid > 0, centroid / 2 + lam * di / (2 * centroid), torch.inf)

    return threshold(w_p, di_p), threshold(w_n, di_n), lam


def entropy(n_p: Tensor, n_n: Tensor, numel: Tensor) -> Tensor:
    """First-order entropy of the assignment, in bits a weight."""
    shares = torch.stack([n_p, n_n, numel - n_p - n_n]) / numel
    return -torch.xlogy(shares, shares).sum(0) / torch.log(torch.tensor(2.0, dtype=shares.dtype))
