"""EC2T's arithmetic against literal definitions: the three-way argmin, autograd, and the paper's guarantees."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import REFERENCE
from model_quantization import ec2t
from model_quantization.optimizer import EC2TOptimizer
from model_quantization.quantized_layers import QuantizedLayers

ASSIGNMENTS = np.load(REFERENCE / "assignments.npz")
TERNARY = torch.ones(1, dtype=torch.float64)  # levels of a ternary layer
CASES = sorted({int(name.split("_")[0]) for name in ASSIGNMENTS.files})


def network_of(*weights: Tensor) -> nn.Module:
    network = nn.Module()
    for i, weight in enumerate(weights):
        network.register_parameter(f"w{i}", nn.Parameter(weight.clone()))
    return network


def layers_of(*weights: Tensor, s: float = 0.3, g: float = 0.15, **options) -> QuantizedLayers:
    return QuantizedLayers(network_of(*weights), [f"w{i}" for i in range(len(weights))], s, g, **options)


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


@pytest.mark.parametrize("bits", [(2, 2), (2, 5), (8, 3)])
def test_centroid_gradients_are_autograds(bits):
    torch.manual_seed(0)
    weights = torch.randn(6, 5, 3, 3), torch.randn(40, 10)
    layers = QuantizedLayers(network_of(*weights), dict(zip(("w0", "w1"), bits, strict=True)), 0.3, 0.3)
    g_q = torch.randn_like(layers.quantized)
    layers.gradient.copy_(g_q)
    before = layers.weights.detach().clone()
    layers.scale_gradients()
    for i in range(2):
        w_p, w_n = (c.clone().requires_grad_() for c in layers.centroids.detach()[:, i])
        assignment = layers.view(layers.assignment, i)
        q = assignment * torch.where(assignment > 0, w_p, w_n)
        assert torch.equal(q, layers.view(layers.quantized, i))
        (q * layers.view(g_q, i)).sum().backward()
        assert layers.centroids.grad[0, i].item() == pytest.approx(w_p.grad.item(), rel=1e-4)
        assert layers.centroids.grad[1, i].item() == pytest.approx(w_n.grad.item(), rel=1e-4)
        ternary = torch.where(assignment > 0, w_p, torch.where(assignment < 0, w_n, 1.0))
        scale = ternary if bits[i] == 2 else 1.0
        assert torch.allclose(layers.view(layers.weights.grad, i), layers.view(g_q, i) * scale)
    assert torch.equal(layers.weights, before)


def test_backward_reaches_the_gradient_buffer_through_a_real_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False))
    layers = QuantizedLayers(network, ["0.weight", "2.weight"], 0.3, 0.1)
    images = torch.randn(2, 3, 8, 8)
    twin = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False))
    twin.load_state_dict(network.state_dict())
    for net in (network, twin):
        net(images).square().sum().backward()
    for i, module in ((0, twin[0]), (1, twin[2])):
        assert torch.allclose(layers.view(layers.gradient, i), module.weight.grad)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_follows_gradients_that_torch_set_to_nothing(set_to_none):
    networks = [nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False)) for _ in "ab"]
    networks[1].load_state_dict(networks[0].state_dict())
    images, results = torch.randn(2, 3, 8, 8), []
    for network in networks:
        layers = QuantizedLayers(network, ["0.weight", "2.weight"], 0.3, 0.1)
        optimizer = EC2TOptimizer(layers, [], 1e-2, 1e-2, 0.0)
        for _ in range(3):
            optimizer.zero_grad() if network is networks[0] else network.zero_grad(set_to_none)
            network(images).square().sum().backward()
            optimizer.step()
        results.append(layers.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name])


def test_centroids_stay_above_their_floor():
    torch.manual_seed(0)
    weights = torch.randn(64, 32)
    layers = layers_of(weights, s=0.01, g=0.1)
    assert torch.allclose(layers.centroids, 0.675 * weights.std().expand(2, 1), rtol=1e-4)


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_extent_is_that_of_the_weights(shift):
    torch.manual_seed(0)
    weights = [torch.randn(700) + shift, torch.randn(13, 3, 3, 3) * 5, torch.randn(256), torch.randn(1, 257)]
    extent = layers_of(*weights).extent()
    for i, w in enumerate(weights):
        assert extent.max[i] == w.max() and extent.min[i] == w.min() and extent.numel[i] == w.numel()
        assert extent.std[i].item() == pytest.approx(w.double().std().item(), rel=1e-5)


@pytest.mark.parametrize("n", [1, 3, 7, 127])
def test_least_squares_steps_are_those_of_a_fine_search(n):
    magnitudes = torch.randn(400).abs()
    step = ec2t.least_squares_step(magnitudes, n)

    def error(step: float) -> float:
        return (magnitudes - step * (magnitudes / step).round().clamp(max=n)).square().sum().item()

    best = min(error(float(one)) for one in torch.linspace(0.02, 1.2, 3000) * magnitudes.max() / n)
    assert error(step.item()) <= 1.02 * best
    assert ec2t.least_squares_step(magnitudes[:0], n) == 0


def test_auto_steps_start_both_sides_apart():
    weights = torch.cat([torch.rand(300), -2 * torch.rand(300)])
    layers = QuantizedLayers(network_of(weights), {"w0": 4}, "auto", 0.0)
    w_p, w_n = layers.centroids[:, 0].tolist()
    assert 0.1 < w_p < 0.15 and 0.2 < w_n < 0.3
    assert (layers.view(layers.quantized, 0) - weights).abs().max() < 0.2


def test_layer_factor_and_its_later_form():
    numel = torch.tensor([100.0, 400.0], dtype=torch.float64)
    assert ec2t.layer_factor(numel).tolist() == [0.25, 1.0]
    assert ec2t.layer_factor(numel, 0.05).tolist() == pytest.approx([0.3 / 1.05, 1.0])


def test_entropy_of_equal_clusters_and_of_one_cluster():
    thirds = torch.tensor([3.0, 0.0], dtype=torch.float64)
    numel = torch.tensor([9.0, 9.0], dtype=torch.float64)
    sizes = torch.stack([thirds, thirds])[..., None]
    assert ec2t.entropy(sizes, numel).tolist() == pytest.approx([np.log2(3), 0.0])


def test_a_frozen_assignment_stays_and_centroids_move():
    torch.manual_seed(0)
    layers = layers_of(torch.randn(20, 20))
    layers.frozen = True
    other = nn.Parameter(torch.ones(3))
    optimizer = EC2TOptimizer(layers, [other], 0.1, 0.01, 0.0)
    assignment, weights = layers.assignment.clone(), layers.weights.detach().clone()
    centroids = layers.centroids.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        layers.gradient.normal_()
        other.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(layers.assignment, assignment) and torch.equal(layers.weights, weights)
    assert (layers.centroids != centroids).all() and (other < 1).all()
    values = layers.view(layers.quantized, 0).unique()
    assert torch.equal(values, torch.stack([-layers.centroids[1, 0], torch.tensor(0.0), layers.centroids[0, 0]]))


def test_pruning_keeps_trained_values_and_trains_them():
    torch.manual_seed(0)
    layers = layers_of(torch.randn(30, 30), prune=True)
    kept = layers.assignment != 0
    assert torch.equal(layers.quantized[kept], layers.weights[kept])
    assert (layers.quantized[~kept] == 0).all() and 0 < kept.sum() < 900
    layers.frozen = True
    optimizer = EC2TOptimizer(layers, [], 0.01, 0.01, 0.0)
    layers.gradient.fill_(1.0)
    before = layers.quantized.clone()
    optimizer.step()
    assert torch.allclose(layers.quantized[kept], before[kept] - 0.01)
    assert (layers.quantized[~kept] == 0).all()


def test_both_centroids_move_towards_a_target_on_their_side_of_zero():
    torch.manual_seed(0)
    layers = layers_of(torch.randn(50, 50), g=0.0)
    optimizer = EC2TOptimizer(layers, [], 1e-9, 1e-2, 0.0)
    target = 2 * layers.quantized.clone()
    before = layers.centroids.detach().clone()
    layers.gradient.copy_(layers.quantized - target)
    optimizer.step()
    assert (layers.centroids > before).all()


def test_channels_last_weights_give_the_same_layers():
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 3, 3)
    plain, other = layers_of(weight), layers_of(weight.to(memory_format=torch.channels_last))
    assert other.parameters[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain.parameters[0], other.parameters[0])
    assert torch.equal(plain.by_layer()["assignments"]["w0"], other.by_layer()["assignments"]["w0"])


def test_state_round_trip():
    torch.manual_seed(0)
    first, second = layers_of(torch.randn(30)), layers_of(torch.randn(30))
    second.load_state_dict(first.state_dict())
    second.assign()
    assert torch.equal(first.quantized, second.quantized)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("prune", [False, True])
def test_a_step_never_waits_for_the_device(frozen, prune):
    """On the meta device, whose tensors have no values, whatever reads a value back to the host raises."""
    layers = layers_of(torch.empty(40, 30, device="meta"), torch.empty(8, 4, 3, 3, device="meta"), prune=prune)
    layers.frozen = frozen
    layers.scale_gradients()
    layers.assign()
    with pytest.raises(RuntimeError):
        layers.weights.max().item()


def test_compiled_steps_equal_plain_ones(monkeypatch):
    """Traced whole (no break in the graph) and over all rows at once; without a backend that takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    weights = torch.randn(40, 30), torch.randn(8, 40)
    plain, compiled = layers_of(*weights), layers_of(*weights)
    compiled.compile()
    compiled.assign()
    before = plain.assignment.clone()
    for _ in range(3):
        plain.gradient.normal_()
        compiled.gradient.copy_(plain.gradient)
        for layers in (plain, compiled):
            layers.scale_gradients()
            with torch.no_grad():
                layers.weights -= 0.05 * layers.weights.grad
                layers.centroids -= 0.01 * layers.centroids.grad
            layers.assign()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor)
    assert not torch.equal(before, plain.assignment), "nothing moved"
