"""EC2T's assignment against literal definitions: the argmin of the costs, and the paper's guarantees."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import REFERENCE
from helpers.ec2t_layers import layers_of, network_of
from model_quantization import ec2t
from model_quantization.optimizer import EC2TOptimizer
from model_quantization.quantized_layers import QuantizedLayers

ASSIGNMENTS = np.load(REFERENCE / "assignments.npz")
TERNARY = torch.ones(1, dtype=torch.float64)  # levels of a ternary layer
CASES = sorted({int(name.split("_")[0]) for name in ASSIGNMENTS.files})


def literal_costs(w: Tensor, w_p: float, w_n: float, g: float, delta: float) -> tuple[Tensor, float]:
    """The costs of -w_n, 0 and w_p for every weight, `[3, ...]`, by the paper's text, in float64."""
    w = w.double()
    centroids = torch.tensor([-w_n, 0.0, w_p], dtype=torch.float64)
    distance = torch.stack([(w - c) ** 2 for c in centroids])
    nearest = distance.argmin(0)
    p = torch.stack([(nearest == i).double().mean() for i in range(3)])
    if p[1] < 0.5:
        p[[0, 2]] *= 0.5 / (p[0] + p[2])
        p[1] = 0.5
    information = -torch.log2(p)
    limits = []
    for outermost, centroid, i in ((w.max(), w_p, 2), (-w.min(), w_n, 0)):
        if p[i] > 0:
            limits.append((outermost**2 - (centroid - outermost) ** 2) / (information[i] - information[1]))
    lam = g * delta * min(limits) if limits else 0.0
    cost = distance + lam * information.view(3, *[1] * w.ndim).nan_to_num(posinf=1e30)
    return cost, float(lam)


@pytest.mark.parametrize("case", CASES)
def test_reference_assignments_are_reproduced_exactly(case):
    weights = torch.from_numpy(ASSIGNMENTS[f"{case}_weights"])
    w_p, w_n, g, delta, lam, prune = ASSIGNMENTS[f"{case}_scalars"]
    layers = layers_of(weights, g=g, prune=bool(prune))
    layers.strength *= delta  # of a network whose largest layer is 1 / delta times as large
    layers.centroids.data = torch.tensor([[w_p], [w_n]], dtype=torch.float32)
    layers.assign()
    assert np.array_equal(layers.view(layers.assignment, 0), ASSIGNMENTS[f"{case}_assignment"])
    assert np.array_equal(layers.view(layers.quantized, 0), ASSIGNMENTS[f"{case}_quantized"])

    extent = layers.extent()
    sizes = torch.stack([(weights > w_p / 2).sum(), (weights < -w_n / 2).sum()]).double().view(2, 1, 1)
    steps = torch.tensor([[w_p], [w_n]])
    _, found = ec2t.thresholds(steps, sizes, extent, torch.tensor([g * delta]), TERNARY)
    assert found.item() == pytest.approx(lam, rel=1e-5)


@st.composite
def two_sided_weights(draw) -> Tensor:
    shape = draw(st.sampled_from([(8, 4, 3, 3), (33, 7), (5, 3, 1, 1), (300,), (16, 16, 5, 5)]))
    scale = 10.0 ** draw(st.integers(-4, 3))
    shift = draw(st.floats(-0.7, 0.7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    power = draw(st.sampled_from([1, 3]))  # 3: heavy tails
    weights = (torch.randn(shape, generator=generator) ** power + shift) * scale
    weights.view(-1)[0], weights.view(-1)[1] = 2 * scale, -2 * scale
    return weights


@settings(max_examples=150, deadline=None)
@given(two_sided_weights(), st.floats(0.05, 0.9), st.floats(0, 0.95), st.booleans())
def test_assignment_is_the_argmin_of_the_costs(weights, s, g, with_larger_layer):
    """Up to weights whose two best costs are equal within float32 rounding."""
    others = [torch.randn(4 * weights.numel())] if with_larger_layer else []
    layers = layers_of(weights, *others, s=s, g=g)
    w_p, w_n = layers.centroids[:, 0].double().tolist()
    cost, _ = literal_costs(weights, w_p, w_n, g, 0.25 if with_larger_layer else 1.0)
    chosen = cost.gather(0, (layers.view(layers.assignment, 0).long() + 1)[None])[0]
    best = cost.amin(0)
    rounding = 4 * torch.finfo(torch.float32).eps * (weights.double() ** 2 + max(w_p, w_n) ** 2)
    assert ((chosen - best) <= rounding).all()


def literal_costs_of_levels(w: Tensor, steps: list[float], n: int, strength: float) -> Tensor:
    """As `literal_costs`, for the levels -n ... n: `[2n + 1, ...]`."""
    w_p, w_n = steps
    k = torch.arange(-n, n + 1, dtype=torch.float64)
    centroids = torch.where(k > 0, k * w_p, k * w_n)
    column = [-1, *[1] * w.ndim]
    distance = (w.double()[None] - centroids.view(column)) ** 2
    distance[(centroids == 0) & (k != 0)] = torch.inf  # a side whose step is 0 has no levels
    nearest = distance.argmin(0)
    p = torch.bincount(nearest.flatten(), minlength=2 * n + 1).double() / w.numel()
    others = p.clone()
    others[n] = 0
    floor = 0.5 if n == 1 else others.max() / (1 - p[n] + others.max())
    if p[n] < floor:
        p = others * (1 - floor) / others.sum()
        p[n] = floor
    information = -torch.log2(p.clamp(min=1e-30))
    limits = []
    for outermost, sign, step in ((w.double().max(), 1, w_p), (-w.double().min(), -1, w_n)):
        own = min(n, int(torch.ceil(outermost / step - 0.5))) if step > 0 and outermost > step / 2 else 0
        if own:
            saved = (information[n + sign * own] - information[n]).clamp(min=1e-30 if n == 1 else 1.0)
            limits.append((outermost**2 - (own * step - outermost) ** 2) / saved)
    lam = strength * min(limits) if limits else 0.0
    return distance + lam * information.view(column)


def assert_cheapest(layers: QuantizedLayers, i: int, weights: Tensor, strength: float) -> None:
    """Up to weights whose best costs are equal within float32 rounding of an edge.

    Layers with a weight between two nearest centroids within that rounding are left out: either may count it.
    """
    n = int(layers.levels[i])
    steps = layers.centroids[:, i].double().tolist()
    for side, step in zip((weights, -weights), steps, strict=True):
        places = side.double()[side > 0] / step - 0.5 if step else torch.zeros(1)
        assume(not ((places - places.round()).abs() < 1e-6 * places.abs().clamp(min=1)).any() or not step)
    cost = literal_costs_of_levels(weights, steps, n, strength)
    k = layers.view(layers.assignment, i)
    chosen = cost.gather(0, (k.long() + n)[None])[0]
    scale = weights.double().abs().max() ** 2 + (n * max(steps)) ** 2
    assert ((chosen - cost.amin(0)) <= 8 * torch.finfo(torch.float32).eps * scale).all()
    assert torch.equal(layers.view(layers.quantized, i), k * torch.where(k > 0, *layers.centroids[:, i]))


@settings(max_examples=150, deadline=None)
@given(two_sided_weights(), st.integers(2, 8), st.floats(0.05, 1), st.floats(0, 0.95), st.integers(2, 8))
def test_assignment_is_the_argmin_for_all_bits(weights, bits, s, g, other_bits):
    """Beside a layer of another width, so that the formulas run over layers of different numbers of levels."""
    network = network_of(weights, torch.randn(4 * weights.numel()))
    layers = QuantizedLayers(network, {"w0": bits, "w1": other_bits}, s, g)
    assert_cheapest(layers, 0, weights, 0.25 * g)


@settings(max_examples=50, deadline=None)
@given(two_sided_weights(), st.integers(5, 8), st.floats(0.05, 1), st.floats(0, 0.95), st.integers(2, 8))
def test_looking_up_and_searching_assign_alike(weights, bits, s, g, other_bits):
    """A CPU looks levels up, a GPU and compiled code search for them."""
    found = []
    for compiling in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", partial(bool, compiling))
            layers = QuantizedLayers(network_of(weights, -weights), {"w0": bits, "w1": other_bits}, s, g)
            found.append(layers.assignment)
    assert torch.equal(*found)


# zero, or large enough for 32 bit to tell a hundredth of it
FEW = st.floats(-10, 10, width=32).map(lambda value: value if abs(value) > 1e-30 else 0.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(FEW, min_size=1, max_size=12), st.integers(2, 8), st.floats(0, 0.95))
@example([torch.finfo(torch.float32).tiny], 3, 0.0)
@example([1.401298464324817e-45, -1.0], 3, 0.0)  # the smallest number above zero
def test_assignment_of_few_and_equal_weights_is_the_argmin(values, bits, g):
    weights = torch.tensor(values)
    if bits == 2:  # a ternary layer with half of its weights in one cluster has 0 / 0 as its lambda_c
        weights = torch.cat([weights, -weights])
    layers = QuantizedLayers(network_of(weights), {"w0": bits}, 0.7, g)
    assert_cheapest(layers, 0, weights, g)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_probabilities_sum_to_one_and_zero_is_at_least_a_half(numel, a, b):
    n_p = int(a * numel)
    n_n = int(b * (numel - n_p))
    sizes = torch.tensor([n_p, n_n], dtype=torch.float64).view(2, 1, 1)
    (p_p, p_n), p_0 = ec2t.probabilities(sizes, torch.tensor([numel], dtype=torch.float64), TERNARY)
    assert (p_p + p_0 + p_n).item() == pytest.approx(1, abs=1e-12)
    assert p_0 >= 0.5 and p_p >= 0 and p_n >= 0
    if n_p and n_n:
        assert (p_p / p_n).item() == pytest.approx(n_p / n_n)


@settings(max_examples=150, deadline=None)
@given(two_sided_weights(), st.floats(0.01, 1), st.floats(0, 0.99))
def test_no_cluster_is_ever_lost(weights, s, g):
    layers = layers_of(weights, s=s, g=g)
    for cluster in layers.cluster_sizes():
        assert (cluster >= 1).all()


DEGENERATE = {
    "all zero": torch.zeros(3, 3),
    "constant": torch.full((4, 4), 0.5),
    "negative constant": torch.full((4, 4), -0.5),
    "positive": torch.rand(50) + 0.1,
    "negative": -torch.rand(50) - 0.1,
    "one weight": torch.tensor([0.3]),
    "one zero": torch.tensor([0.0]),
    "two weights": torch.tensor([0.3, -0.2]),
    "almost one-sided": torch.cat([-torch.rand(500), torch.tensor([1e-6])]),
    **{f"{n} weights": torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in range(3, 9)},
}


@pytest.mark.parametrize("weights", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prune", [False, True])
def test_degenerate_layers_have_a_defined_outcome(weights, dtype, prune):
    """Every side of zero that has weights keeps a cluster, and nothing becomes NaN, through a step as well.

    A layer of zeros has centroids of 0, and stays zero until its weights differ from each other.
    """
    layers = layers_of(weights.to(dtype), s=0.4, g=0.5, prune=prune)
    optimizer = EC2TOptimizer(layers, [], 1e-3, 1e-3, 0.0)
    for _ in range(2):
        assert layers.parameters[0].dtype == dtype
        assert layers.quantized.isfinite().all() and layers.centroids.isfinite().all()
        w, assignment = layers.view(layers.weights, 0), layers.view(layers.assignment, 0)
        w_p, w_n = layers.centroids[:, 0]
        assert (assignment > 0).any() == (w > 0).any() & (w_p > 0)
        assert (assignment < 0).any() == (w < 0).any() & (w_n > 0)
        assert weights.any() == layers.quantized.any()
        layers.gradient.fill_(0.01)
        optimizer.step()
