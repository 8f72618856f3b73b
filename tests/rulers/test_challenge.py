"""The challenge ruler: single operations and layers by hand, and what has no rule."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from helpers.tallies import FULL, batch_norm, counted, lines, total
from model import build
from rulers import RULERS
from rulers.challenge import count
from rulers.tally import Uncounted, Widths


class Apply(nn.Module):
    """A network that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# ----------------------------------------------------------------------------------------- single operations


@pytest.mark.parametrize(
    ("function", "shape", "mults", "adds"),
    [
        (F.relu, (4, 5, 6), 120, 0),
        (lambda x: x.relu_(), (4, 5, 6), 120, 0),
        (F.relu6, (4, 5, 6), 120, 0),
        (nn.ReLU(inplace=True), (7,), 7, 0),
        (F.silu, (4, 5, 6), 360, 120),
        (lambda x: x * torch.sigmoid(x), (4, 5, 6), 360, 120),
        (torch.sigmoid, (4, 5, 6), 240, 120),
        (F.hardswish, (4, 5, 6), 480, 120),
        (F.hardsigmoid, (4, 5, 6), 360, 120),
        (lambda x: x + x, (4, 5, 6), 0, 120),
        (lambda x: x.add_(1), (4, 5, 6), 0, 120),
        (lambda x: x * x[:, :, :1, :1], (4, 5, 6), 120, 0),  # the scale of squeeze and excitation
        (lambda x: F.adaptive_avg_pool2d(x, 1), (4, 5, 6), 4, 29 * 4),
        (lambda x: x.mean((2, 3)), (4, 5, 6), 4, 29 * 4),
        (nn.AvgPool2d(2), (4, 6, 8), 48, 3 * 48),
        (nn.AvgPool2d((3, 1), stride=1), (4, 5, 6), 72, 2 * 72),
        (nn.AdaptiveAvgPool2d(2), (4, 6, 6), 16, 8 * 16),
        (nn.AdaptiveAvgPool2d((2, 1)), (4, 5, 3), 8, 8 * 8),  # rows 0-2 and 2-4: two windows of 3 x 3
    ],
)
def test_operation(function, shape, mults, adds):
    tally = count(Apply(function), shape, FULL)
    assert total(tally) == (0, mults, adds)
    assert tally.uncounted == []


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(1, 2, 2, 30).permute(0, 3, 1, 2).contiguous().flatten(1),
        lambda x: torch.cat([x, x[:, :2, ::2].repeat(1, 1, 2, 1)[:, :, :5]], dim=1),
        lambda x: F.pad(x, (1, 1, 0, 2)).transpose(1, 2).unsqueeze(0).squeeze(0),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: torch.stack(x.chunk(2, dim=1)).clone(),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.pixel_shuffle(x, 2),
        nn.Dropout(0.5),
        nn.Identity(),
    ],
)
def test_moving_data_is_free(function):
    tally = count(Apply(function), (4, 5, 6), FULL)
    assert tally.groups == [] and tally.uncounted == []


def randomized(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize(
    ("layer", "shape", "values", "mults", "adds"),
    [
        # 4 * 5 * 6 outputs of 3 * 9 products
        (nn.Conv2d(3, 4, 3, padding=1, bias=False), (3, 5, 6), 108, 27 * 120, 26 * 120),
        (nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6), 112, 27 * 120, 27 * 120),
        (nn.Conv2d(3, 4, 3, stride=2), (3, 7, 9), 112, 27 * 48, 27 * 48),
        (nn.Conv2d(6, 6, 5, groups=6), (6, 5, 5), 156, 25 * 6, 25 * 6),
        (nn.Conv2d(4, 6, 1, groups=2, bias=False), (4, 3, 3), 12, 2 * 54, 54),
        (nn.Conv1d(3, 4, 2, bias=False), (3, 5), 24, 6 * 16, 5 * 16),
        (nn.Linear(5, 3), (5,), 18, 15, 15),
        (nn.Linear(5, 3, bias=False), (5,), 15, 15, 12),
        (nn.Linear(5, 3), (7, 5), 18, 7 * 15, 7 * 15),
        (nn.Conv2d(1, 1, 1, bias=False), (1, 2, 2), 1, 4, 0),  # one value is never dearer for being ternary
    ],
)
def test_dense_layer(layer, shape, values, mults, adds):
    tally = count(randomized(layer), shape, Widths(16, 16, 32))
    assert total(tally) == (values * 16, mults, adds)
    assert tally.total_mflop == pytest.approx((mults * 16 + adds * 32) / 32e6)
    assert tally.params == tally.numel == values


def test_sparse_layer_counts_what_is_not_zero():
    conv = randomized(nn.Conv2d(4, 2, 3, bias=False))
    conv.weight.data[0, :3] = 0  # 27 of 72 weights
    (line,) = lines(count(conv, (4, 5, 5), FULL)).values()
    assert counted(line) == (72 + 45 * 32, 45 * 9, 43 * 9)
    assert (line.numel, line.nonzero, line.note) == (72, 45, "mask")
    assert line.shape == "3x3 at 5x5, 4 -> 2"


def test_shapes_of_layers():
    network = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 6, (1, 2)), nn.Flatten(), nn.Linear(54, 3))
    network[1].weight.data[2:4] = 0
    shapes = [line.shape for line in lines(count(network, (4, 5, 6), FULL)).values() if line.shape]
    assert shapes == ["3x3 at 5x6, 4 -> 8 in 4 groups", "1x2 at 3x4, 8 -> 6, 2 dead", "54 -> 3"]


def test_ternary_layer():
    conv = nn.Conv2d(4, 2, 3, bias=False)
    conv.weight.data = torch.tensor([0.3, -0.2, 0.0, 0.3]).repeat(18).reshape(2, 4, 3, 3)
    (line,) = lines(count(conv, (4, 5, 5), Widths(16, 16, 32))).values()
    # 54 of 72 weights: a mask, a sign for each of them, two values; 27 - 1 additions for each of 18 outputs
    assert counted(line) == (72 + 54 + 2 * 16, 2 * 18, 26 * 18)
    assert line.note == "mask and signs"


def test_functional_layers_count_by_their_weights():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.head = nn.ParameterDict({"weight": torch.randn(2, 4), "bias": torch.randn(2)})

        def forward(self, x):
            x = F.conv2d(x, self.kernel).mean((2, 3))
            return F.linear(x, self.head["weight"], self.head["bias"])

    tally = count(Functional(), 5, FULL)
    assert [(group.name, group.lines[0].name) for group in tally.groups] == [
        ("convolutions", "convolution"),
        ("linear layers", "head"),
        ("poolings", "mean"),
    ]
    assert total(tally) == ((108 + 10) * 32, 27 * 36 + 8 + 4, 26 * 36 + 8 + 8 * 4)


# ------------------------------------------------------------------------------------------------ BatchNorm


def test_batch_norm_behind_a_layer_is_a_bias():
    conv = randomized(nn.Conv2d(3, 4, 3, bias=False))
    merged = count(nn.Sequential(conv, batch_norm(4)), 5, FULL)
    assert total(merged) == ((108 + 4) * 32, 27 * 36, 27 * 36)
    assert list(lines(merged)) == ["0"]
    assert merged.numel == merged.params == 108 + 8

    biased = randomized(nn.Conv2d(3, 4, 3))  # its bias and those of two BatchNorms are one
    assert total(count(nn.Sequential(biased, batch_norm(4), batch_norm(4)), 5, FULL)) == total(merged)

    linear = randomized(nn.Linear(3, 4, bias=False))
    assert total(count(nn.Sequential(linear, nn.BatchNorm1d(4)), (3,), FULL)) == ((12 + 4) * 32, 12, 12)


def test_batch_norm_elsewhere_is_executed():
    conv = randomized(nn.Conv2d(3, 4, 3, bias=False))
    before = lines(count(nn.Sequential(batch_norm(3), conv), 5, Widths(16, 16, 32)))
    assert counted(before["0"]) == (2 * 3 * 16, 75, 75)
    assert counted(before["1"]) == (108 * 16, 27 * 36, 26 * 36)
    behind_relu = lines(count(nn.Sequential(conv, nn.ReLU(), batch_norm(4)), 5, Widths(16, 16, 32)))
    assert counted(behind_relu["2"]) == (2 * 4 * 16, 36, 36)


def test_batch_norm_does_not_merge_where_others_read_the_convolution():
    class Branching(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.conv = randomized(nn.Conv2d(3, 4, 3, bias=False))
            self.norm = batch_norm(4)
            self.function = function

        def forward(self, x):
            x = self.conv(x)
            return self.function(x, self.norm(x))

    for function in (torch.add, lambda x, normalized: [x, normalized]):
        found = lines(count(Branching(function), 5, FULL))
        assert counted(found["norm"]) == (2 * 4 * 32, 36, 36)
        assert counted(found["conv"]) == (108 * 32, 27 * 36, 26 * 36)
    assert "norm" not in lines(count(Branching(lambda x, normalized: normalized), 5, FULL))


def test_micronet_block():
    """bn1, conv1, bn2, ReLU, conv2, bn3 and the addition, on 8 channels of 4 x 4."""
    network = build({"name": "cifar_micronet", "num_classes": 10})
    block = network.layer1[0]
    found = lines(count(block, (16, 4, 4), Widths(16, 16, 32)))
    n = 16 * 4 * 4
    assert counted(found["bn1"]) == (2 * 16 * 16, n, n)
    assert counted(found["conv1"]) == ((16 * 144 + 16) * 16, 144 * n, 144 * n)
    assert counted(found["relu"]) == (0, n, 0)
    assert counted(found["conv2"]) == ((16 * 144 + 16) * 16, 144 * n, 144 * n)
    assert counted(found["add"]) == (0, 0, n)
    assert len(found) == 5


# ------------------------------------------------------------------------------------- uncounted, and places


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        inner = nn.Sequential(Apply(torch.digamma), Apply(torch.digamma))
        self.body = nn.Sequential(Apply(torch.i0), inner, Apply(F.relu))

    def forward(self, x):
        x = self.body(x)
        return torch.digamma(torch.digamma(F.relu(x)) + 1)


def test_operations_without_a_rule_are_listed_with_count_and_place():
    tally = count(Nested(), (4, 6, 6), FULL)
    assert tally.uncounted == [
        Uncounted("i0", 1, "body.0"),
        Uncounted("digamma", 1, "body.1.0"),
        Uncounted("digamma", 1, "body.1.1"),
        Uncounted("digamma", 2, ""),
    ]
    assert [line.name for group in tally.groups for line in group.lines] == ["body.2", "relu", "add"]


# ---------------------------------------------------------------------------------------------- any network


def test_shared_weights_are_stored_once_and_executed_twice():
    conv = randomized(nn.Conv2d(3, 3, 3, padding=1))
    tally = count(nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU()), 4, FULL)
    n = 3 * 16
    assert counted(lines(tally)["0"]) == (84 * 32, 2 * 27 * n, 2 * 27 * n)
    assert tally.numel == tally.params == 84


def test_other_stored_values_count():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3, 1, 1))
            self.norm = nn.LayerNorm(5)
            self.register_buffer("offset", torch.randn(5))
            self.unused = nn.Parameter(torch.randn(9))

        def forward(self, x):
            return self.norm(x * self.scale) + self.offset

    torch.manual_seed(0)
    tally = count(Scaled(), 5, FULL)
    assert counted(lines(tally)["mul"]) == (3 * 32, 75, 0)
    assert counted(lines(tally)["add"]) == (5 * 32, 0, 75)
    assert tally.by_analogy == {"native_layer_norm": pytest.approx((3 * 75 + 3 * 15 + 4 * 75 - 15) / 1e6)}
    # its five ones are a mask, signs and two values, its five zeros an empty mask
    assert counted(lines(tally)["norm"]) == (5 + 5 + 64 + 5, 3 * 75 + 3 * 15, 4 * 75 - 15)
    assert tally.uncounted == []
    assert (tally.params, tally.numel) == (22, 13)


def test_weights_computed_from_parameters_count_as_what_they_become():
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3, bias=False)
    normalized = nn.utils.parametrizations.weight_norm(copy.deepcopy(plain))
    standardized = Apply(lambda x: F.conv2d(x, plain.weight.detach() - plain.weight.detach().mean()))
    for network in (normalized, standardized):
        assert total(count(network, 5, FULL)) == total(count(plain, 5, FULL))


def test_network_that_looks_at_values():
    class Impatient(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            return x if x.abs().max().item() > 1e9 else F.relu(x)

    tally = count(Impatient(), 5, FULL)
    assert counted(lines(tally)["relu"]) == (0, 36, 0)
    assert counted(lines(tally)["conv"]) == (112 * 32, 27 * 36, 27 * 36)


def test_a_network_that_fails_fails_with_its_own_error():
    with pytest.raises(RuntimeError, match=r"expected input.* to have 4 channels"):
        count(nn.Conv2d(4, 4, 3), 5, FULL)


@pytest.mark.parametrize("looks_at_values", [False, True])
def test_counting_leaves_everything_as_it_was(looks_at_values, two_threads):
    class Counter(nn.Module):
        """Changes a buffer whenever it runs."""

        def __init__(self):
            super().__init__()
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x):
            self.runs.add_(1)
            return x * (1 if not looks_at_values else float(self.runs))

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), Counter()).train()
    network[1].eval()
    before = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    parameters = list(network.parameters())
    RULERS["challenge"].count(network, "", 5, FULL)
    assert [module.training for module in network] == [True, False, True, True] and network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(now is then for now, then in zip(network.parameters(), parameters, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == 2


@pytest.mark.parametrize("model", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "densenet121"])
def test_architectures_of_torchvision(model):
    """Their multiplications are the multiply-accumulates that torchvision names."""
    network = getattr(torchvision.models, model)()
    tally = count(network, 224, FULL)
    weights = torchvision.models.get_model_weights(model).DEFAULT
    layers = [group for group in tally.groups if group.name in ("convolutions", "linear layers")]
    gmacs = sum(group.total("mults") for group in layers) / 1e9
    assert gmacs == pytest.approx(weights.meta["_ops"], abs=6e-4)
    assert tally.params == tally.numel == weights.meta["num_params"]
    assert tally.uncounted == []
