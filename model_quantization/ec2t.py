"""The formulas of EC2T, each once, for any number of bits (Marban et al., arXiv:2004.01077, is the case of 2).

A layer of b bits has n = 2^(b-1) - 1 levels on either side of zero: centroids k * w_p > 0, 0, and -k * w_n < 0, for
k = 1 ... n, with two step sizes w_p and w_n. Ternary layers have n = 1, and their steps are their centroids.

Tensors are float64: `[L]` has one number a layer; `[2, L]` one for each side of zero, the positive one first, such as
the `steps` (w_p, w_n); `[2, L, N]` one for each level, N being the most levels of any layer. `levels` `[L]` holds n.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CENTROID_FLOOR = 0.675  # of the standard deviation of the layer's weights
MIN_P_0 = 0.5  # zero is always the cheapest cluster of a ternary layer
TINY = 1e-30  # stands for the probability of an empty cluster
CANDIDATES, ROUNDS = 48, 12  # of the search for the steps of least squared error


class Extent(NamedTuple):
    """What EC2T needs to know of each layer's weights, all `[L]`.

    `max` is max(0, w), `min` is min(0, w): a one-sided layer has no extent on its other side.
    """

    max: Tensor
    min: Tensor
    std: Tensor
    numel: Tensor

    @property
    def outermost(self) -> Tensor:
        """The magnitude of the outermost weight on either side, `[2, L]`."""
        return torch.stack([self.max, -self.min])


def levels_of(bits: int) -> int:
    """n, the number of levels on either side of zero."""
    return 2 ** (bits - 1) - 1


def initial_steps(extent: Extent, s: float, levels: Tensor) -> Tensor:
    """Steps `[2, L]` that put the outermost centroid at s times the outermost weight: n * w_p = s * |max w|."""
    return s * extent.outermost / levels


def bounded_steps(steps: Tensor, extent: Extent, levels: Tensor) -> Tensor:
    """Keep the outermost centroids at 0.675 * std(w) or more, and within the layer's weights; `[2, L]`.

    The upper bound is ours. It acts on degenerate ternary layers only, and with it no ternary cluster that has weights
    on its side of zero can ever become empty (for g < 1; see `thresholds`).
    """
    floor = CENTROID_FLOOR * extent.std / levels
    return steps.maximum(floor).minimum(extent.outermost / levels)


def least_squares_step(magnitudes: Tensor, n: int) -> Tensor:
    """The step, float64, for which n levels and zero come closest to `magnitudes` `[M]` of weights; 0 without any.

    The best of some steps, then Lloyd's iteration: each weight's nearest level, and the best step for these.
    """
    if not magnitudes.numel():
        return magnitudes.new_zeros((), dtype=torch.float64)

    def nearest(step: Tensor) -> Tensor:
        return (magnitudes / step).round_().clamp_(max=n)

    candidates = magnitudes.amax() / n * torch.linspace(0.1, 1.1, CANDIDATES, device=magnitudes.device)
    errors = torch.stack([(magnitudes - step * nearest(step)).square().sum() for step in candidates])
    step = candidates[errors.argmin()]
    for _ in range(ROUNDS):
        level = nearest(step)
        step = (level * magnitudes).sum() / level.square().sum().clamp(min=TINY)
    return step.double()


def nearest_edges(steps: Tensor, levels: Tensor, most: int) -> Tensor:
    """Where the nearest level becomes k rather than k - 1, (k - 1/2) * w, `[2, L, N]`; infinite for k > n."""
    k = torch.arange(1, most + 1, dtype=steps.dtype, device=steps.device)
    return torch.where(k <= levels[:, None], (k - 0.5) * steps[..., None], torch.inf)


def probabilities(sizes: Tensor, numel: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """P_k `[2, L, N]` and P_0 `[L]` from the sizes `[2, L, N]` of the nearest-centroid clusters.

    P_0 is raised so that zero is the cheapest cluster, and the others shrink in proportion: all sum to 1. In a ternary
    layer it is raised to 0.5, as published; with more levels to the largest of the others, the least that does so.
    """
    p = sizes / numel[:, None]
    sides = p.sum(2)
    p_0, largest = 1 - sides[0] - sides[1], p.amax((0, 2))
    floor = torch.where(levels == 1, MIN_P_0, largest / (1 - p_0 + largest).clamp(min=TINY))
    shrink = torch.where(p_0 < floor, (1 - floor) / (sides[0] + sides[1]), 1.0)
    return p * shrink[:, None], p_0.maximum(floor)


def information(p: Tensor) -> Tensor:
    """I = -log2 P in bits; a large finite number for an empty cluster."""
    return -torch.log2(p.clamp(min=TINY))


def layer_factor(numel: Tensor, sustain: float = 0.0) -> Tensor:
    """delta `[L]`: a layer's size relative to the largest quantized layer's; `sustain` is sigma of the later form."""
    return (numel / numel.max() + sustain) / (1 + sustain)


def lagrangian(steps: Tensor, di: Tensor, extent: Extent, strength: Tensor, levels: Tensor) -> Tensor:
    """lambda = g * delta * min(lambda_n, lambda_p), `[L]`; `strength` is g * delta, `di` `[2, L, N]` is I_k - I_0.

    At lambda_c the outermost weight of a side would leave its own centroid for zero; where that saves less than 1 bit,
    which ternary layers allow, as published, other layers count 1 bit. A side without weights has no say; lambda is 0
    for a layer of zeros.
    """
    outermost = extent.outermost
    own = (outermost[..., None] > nearest_edges(steps, levels, di.shape[2])).sum(2)
    gain = outermost**2 - (own * steps - outermost) ** 2
    saved = di.gather(2, (own - 1).clamp(min=0)[..., None])[..., 0]
    limits = torch.where(own > 0, gain / saved.maximum(torch.where(levels == 1, TINY, 1.0)), torch.inf)
    limit = limits.amin(0)
    return torch.where(limit.isinf(), 0.0, strength * limit)


def thresholds(steps: Tensor, sizes: Tensor, extent: Extent, strength: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The assignment as thresholds t `[2, L, N]`: a >= k exactly where w > t_k, a <= -k exactly where -w > t_k.

    Minimising (w - c)^2 + lambda * I_c over the centroids c and expanding the squares, c_i is cheaper than c_j < c_i
    exactly where w > (c_i + c_j) / 2 + lambda * (I_i - I_j) / (2 * (c_i - c_j)): lines of which the assignment is the
    lower envelope. So t_k is the least over i >= k of the largest over j < k of these bounds. As zero is the cheapest
    cluster, the sides do not meet. The second result is lambda, `[L]`. Levels that a layer lacks, or a side whose step
    is 0, have t = inf. `sizes` are those of the nearest-centroid clusters.

    Since lambda <= g * lambda_c, the outermost weight of a side never leaves its centroid for zero if g < 1.
    """
    p, p_0 = probabilities(sizes, extent.numel, levels)
    di = information(p) - information(p_0)[:, None]
    lam = lagrangian(steps, di, extent, strength, levels)
    k = torch.arange(1, sizes.shape[2] + 1, device=steps.device)
    usable = (steps > 0)[..., None] & (k <= levels[:, None])
    c_i, i_i = k * steps[..., None], di
    c_j, i_j = torch.zeros_like(c_i[..., :1]), torch.zeros_like(di[..., :1])  # of zero
    largest, edges = torch.where(usable, -torch.inf, torch.inf), []
    for _ in k:
        bounds = (c_j + c_i) / 2 + lam[:, None] * (i_i - i_j) / (2 * (c_i - c_j))
        largest = torch.where(usable, largest.maximum(bounds), torch.inf)
        edges.append(largest.amin(2))
        (c_j, c_i), (i_j, i_i) = ((each[..., :1], each[..., 1:]) for each in (c_i, i_i))
        largest, usable = largest[..., 1:], usable[..., 1:]
    return torch.stack(edges, 2), lam


def entropy(sizes: Tensor, numel: Tensor) -> Tensor:
    """First-order entropy of the assignment, in bits a weight, `[L]`; `sizes` `[2, L, N]` are those of its clusters."""
    of_levels = sizes.transpose(1, 2).flatten(0, 1)
    shares = torch.cat([of_levels, (numel - of_levels.sum(0))[None]]) / numel
    return -torch.xlogy(shares, shares).sum(0) / torch.log(torch.tensor(2.0, dtype=shares.dtype))
