"""A step of EC2T: gradients against autograd, bounds, frozen and pruned layers, and the state."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from helpers.ec2t_layers import layers_of, network_of
from model_quantization import ec2t
from model_quantization.optimizer import EC2TOptimizer
from model_quantization.quantized_layers import QuantizedLayers


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
