"""The published ruler: the reference scores to the last digit, small networks counted by hand, and laws."""

import copy
import functools
import json
import math

import pytest
import torch
from torch import nn

from helpers import REFERENCE
from helpers.tallies import counted
from model import build
from model.micronet import Layout, MicroNet
from model.selection import ternary_candidates
from model_scoring.pruning import prune_depthwise
from reference.make_checkpoint import make_state_dict
from rulers import RULERS, published
from rulers.published import count, efficientnet
from rulers.tally import TASKS, Group, Line, Tally, Widths

CASES = json.loads((REFERENCE / "scores.json").read_text())
SPECS = {
    "cifar_micronet": {"depth": 1.4**3.5, "width": 1.2**3.5, "num_classes": 100},
    "imagenet_micronet": {"depth": 1.2, "width": 1.3},
}


def test_the_table_of_rulers_knows_the_families_with_a_form():
    assert RULERS["published"].families == tuple(published.FORMS)
    assert RULERS["published"].models == [
        "cifar_micronet",
        "imagenet_micronet",
        *(f"efficientnet-b{i}" for i in "1234"),
        "resnet20",
    ]
    with pytest.raises(ValueError, match="published ruler has no form for mine:net, only for cifar_micronet"):
        RULERS["published"].count(nn.Identity(), "mine:net", 8, Widths())


# ------------------------------------------------------------------------------------------- reference scores


@functools.cache
def reference_network(model: str, salt: int) -> nn.Module:
    """The network of a reference checkpoint; shared, so not to be changed."""
    network = build({"name": model, **SPECS.get(model, {})})
    family = "efficientnet" if model.startswith("efficientnet-b") else "micronet"
    network.load_state_dict(make_state_dict(network, family, salt))
    return network


def flag(case: dict, name: str, default: str) -> str:
    flags = case["flags"]
    return flags[flags.index(name) + 1] if name in flags else default


def widths_of(case: dict) -> Widths:
    value = 32 if "--no-halfprecision" in case["flags"] else 16
    return Widths(value, int(flag(case, "--mul-bits", "16")), int(flag(case, "--add-bits", "16")))


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join([case["model"], *case["flags"]]))
def test_reference_scores(case):
    network = reference_network(case["model"], case["salt"])
    threshold = float(flag(case, "--prune-threshold", "1"))
    if threshold != 1:
        network = copy.deepcopy(network)
        prune_depthwise(network, threshold)

    tally = count(network, case["model"], case["image_size"], widths_of(case))

    groups = [group for group in tally.groups if group.name != "skip additions"]
    assert [tally.scoring_params(group) for group in groups] == case["groups"]["scoring_params"]
    assert [round(tally.mflop(group), 2) for group in groups] == case["groups"]["mflop"]
    assert tally.params == case["params"]
    assert round(tally.zeros_percent, 2) == case["sparsity_percent"]
    assert tally.total_scoring_params == case["scoring_params"]
    assert round(tally.megabytes, 3) == case["megabytes"]
    assert round(tally.total_mflop, 2) == case["mflop"]
    task = TASKS[{"CIFAR100": "CIFAR-100"}.get(case["dataset"], case["dataset"])]
    assert tally.score(task) == pytest.approx(case["score"], rel=0, abs=1e-12)


@pytest.mark.parametrize("model", ["imagenet_micronet", "efficientnet-b1"])
def test_lines_cover_every_parameter_once(model):
    network = reference_network(model, 1)
    tally = count(network, model, 224, Widths())
    assert tally.numel == sum(p.numel() for p in network.parameters())
    names = [line.name for group in tally.groups[:-1] for line in group.lines if line.numel]
    assert len(names) == len(set(names))
    assert all(isinstance(network.get_submodule(name), (nn.Conv2d, nn.Linear)) for name in names)


# ------------------------------------------------------------------------------------------ MicroNet, by hand


def small_micronet(channels: tuple[int, ...] = (8,)) -> MicroNet:
    """A MicroNet: one block a stage, 8 channels after the stem, 2 classes; all ternary weights are 0.5."""
    strides = (1, *(2 for _ in channels[1:]))
    network = MicroNet(Layout(8, (1,) * len(channels), channels, strides, 0.0, 2), 1, 1, 2)
    for name in ternary_candidates(network, "cifar_micronet"):
        network.get_parameter(name).data.fill_(0.5)
    return network


def test_small_micronet_with_dead_filters():
    network = small_micronet()
    weight = network.layer1[0].conv1.weight.data
    weight[3] = 0  # dead
    weight[5, :4] = -0.5  # dead as well: as many -0.5 as 0.5
    tally = count(network, "cifar_micronet", 4, Widths())
    first, shortcuts, ternary, classifier = tally.groups

    # 128 outputs of 27 products each, and as many ReLUs; 216 weights, 8 biases
    assert counted(first.lines[0]) == ((216 + 8) * 16, 27 * 128 + 128, 26 * 128 + 128)
    assert shortcuts.lines == []
    conv1, conv2, pool = ternary.lines
    # 6 of 8 filters live: 6 * 8 * 9 weights, 96 outputs of 72 summands, 8 + 6 biases
    assert counted(conv1) == (2 * 432 + 2 * 16 + 14 * 16, 2 * 96 + 96, 71 * 96 + 96)
    # 6 of 8 inputs live: 8 * 6 * 9 weights, 128 outputs of 54 summands, 8 biases
    assert counted(conv2) == (2 * 432 + 2 * 16 + 8 * 16, 2 * 128, 53 * 128 + 2 * 128)
    assert counted(pool) == (0, 128 + 8, 15 * 8)
    assert counted(classifier.lines[0]) == ((16 + 2) * 16, 16, 16)
    assert tally.params == (216 + 8) + (576 + 2 * 8 + 2 * 8) + (576 + 2 * 8) + (16 + 2)
    assert [line.note for line in ternary.lines] == ["ternary", "ternary", ""]


def test_zeros_in_ternary_weights_save_only_additions():
    network = small_micronet()
    before = count(network, "cifar_micronet", 4, Widths()).groups[2].lines[1]
    network.layer1[0].conv2.weight.data[0, 0, 0, 0] = 0
    after = count(network, "cifar_micronet", 4, Widths()).groups[2].lines[1]
    assert (after.bits, after.mults, after.nonzero) == (before.bits, before.mults, before.nonzero - 1)
    assert after.adds == pytest.approx(before.adds - 4 * 4)  # the weight serves 16 outputs


def test_stage_change_is_counted_at_half_its_input():
    tally = count(small_micronet((8, 16)), "cifar_micronet", 8, Widths())
    _, shortcuts, ternary, _ = tally.groups
    assert counted(shortcuts.lines[0]) == ((128 + 16) * 16, 8 * 400, 8 * 400)  # out = ceil(7 / 2 + 1) = 5
    conv1, conv2 = ternary.lines[2:4]
    n = 3 * 3 * 16  # 4x4 in, out = ceil((4 + 2 - 3) / 2 + 1) = 3, not the network's 4
    assert counted(conv1) == (2 * 1152 + 2 * 16 + (8 + 16) * 16, 2 * n + n, 71 * n + n)
    n = 4 * 4 * 16
    assert counted(conv2) == (2 * 2304 + 2 * 16 + 16 * 16, 2 * n, 143 * n + 2 * n)
    assert counted(ternary.lines[4]) == (0, n + 16, 15 * 16)


def test_wholly_dead_layer_costs_next_to_nothing():
    network = small_micronet()
    network.layer1[0].conv1.weight.data.zero_()
    conv1, conv2, _ = count(network, "cifar_micronet", 4, Widths()).groups[2].lines
    assert counted(conv1) == (2 * 16 + 8 * 16, 0, 0)
    assert counted(conv2) == (2 * 16 + 8 * 16, 2 * 128, -128 + 2 * 128)


# ---------------------------------------------------------------------------- what the 2019 forms do not say


def test_dense_and_pruned_layers_count_their_values():
    network = small_micronet()
    weight = network.layer1[0].conv2.weight.data
    weight.copy_(torch.arange(1.0, 577).reshape(8, 8, 3, 3))
    dense = count(network, "cifar_micronet", 4, Widths()).groups[2].lines[1]
    assert dense.note == "dense"
    assert counted(dense) == (576 * 16 + 8 * 16, 72 * 128, 71 * 128 + 2 * 128)

    weight[:, :4] = 0
    sparse = count(network, "cifar_micronet", 4, Widths()).groups[2].lines[1]
    assert sparse.note == "sparse"
    assert counted(sparse) == (288 * 16 + 576 + 8 * 16, 36 * 128, 35 * 128 + 2 * 128)


def test_resnet20_in_full_precision():
    """Its scoring parameters: all weights, and one bias for each of the 688 channels behind a convolution."""
    network = build({"name": "resnet20"})
    tally = count(network, "resnet20", 32, Widths(32, 32, 32))
    weights = sum(p.numel() for p in network.parameters() if p.ndim > 1)
    assert tally.total_scoring_params == weights + 688 + 10
    assert tally.numel == sum(p.numel() for p in network.parameters())
    assert tally.params == tally.numel - 16  # the first convolution's BatchNorm is merged
    _, shortcuts, ternary, _ = tally.groups
    assert shortcuts.lines == []
    conv1 = ternary.lines[0]  # 16 filters of 144 values, BatchNorm, ReLU
    n = 32 * 32 * 16
    assert counted(conv1) == ((2304 + 16) * 32, pytest.approx(144 * n + n), pytest.approx(143 * n + n))
    assert counted(ternary.lines[-1]) == (0, 64, 63 * 64)


def test_efficientnet_in_full_precision_is_dense_and_larger():
    torch.manual_seed(0)
    dense = count(build({"name": "efficientnet-b1"}), "efficientnet-b1", 224, Widths())
    ternary = count(reference_network("efficientnet-b1", 1), "efficientnet-b1", 224, Widths())
    notes = {line.note for group in dense.groups[:-1] for line in group.lines}
    assert notes == {"dense"}
    expand = dense.groups[1].lines[0]  # 16 -> 96 channels at a quarter of the image
    n = 56 * 56 * 96
    assert counted(expand) == ((16 * 96 + 96) * 16, 16 * n + 3 * n, 16 * n + n)
    assert dense.total_scoring_params > ternary.total_scoring_params
    assert dense.total_mflop > ternary.total_mflop
    assert dense.params == ternary.params


# ----------------------------------------------------------------------------------------------- EfficientNet


@pytest.mark.parametrize(
    ("model", "halved_at"),
    [
        ("efficientnet-b1", (2, 5, 8, 16)),
        ("efficientnet-b2", (2, 5, 8, 16)),
        ("efficientnet-b3", (2, 5, 8, 18)),
        ("efficientnet-b4", (2, 6, 10, 22)),
    ],
)
def test_resolution_is_halved_at_the_published_blocks(model, halved_at):
    with torch.device("meta"):
        network = build({"name": model})
    parts, _ = efficientnet._block_layers(network)
    expected = [0.5 / 2 ** sum(i >= start for start in halved_at) for i in range(len(network._blocks))]
    assert [div for _, div in parts["_depthwise_conv"]] == expected
    assert [div for _, div in parts["_expand_conv"]] == expected[2:]


def test_skip_additions_cost_no_parameters():
    group = count(reference_network("efficientnet-b1", 1), "efficientnet-b1", 256, Widths()).groups[-1]
    assert group.name == "skip additions"
    assert group.total("bits") == group.total("mults") == 0
    # blocks with stride 1 and the same number of channels before and after; (256 / 2 / 2)^2 * 16 elements
    assert [int(line.name.removeprefix("_blocks.")) for line in group.lines] == (
        [1, 3, 4, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 20, 22]
    )
    assert group.lines[0].adds == 64 * 64 * 16


# -------------------------------------------------------------------------------------------- prune_depthwise


def depthwise_and_pointwise() -> nn.Sequential:
    network = nn.Sequential(nn.Conv2d(2, 2, 2, groups=2, bias=False), nn.Conv2d(2, 2, 1, bias=False))
    network[0].weight.data = torch.tensor([[[[1.0, -0.5], [0.49, -0.49]]], [[[-2.0, 0.99], [-1.0, 0.0]]]])
    network[1].weight.data = torch.tensor([[1.0, 0.01], [0.01, 1.0]]).reshape(2, 2, 1, 1)
    return network


def test_prune_depthwise_zeroes_small_magnitudes_of_depthwise_layers_only():
    network = depthwise_and_pointwise()
    prune_depthwise(network, 0.5)  # of the layer's largest, 2
    assert network[0].weight.tolist() == [[[[1.0, 0.0], [0.0, 0.0]]], [[[-2.0, 0.0], [-1.0, 0.0]]]]
    assert torch.equal(network[1].weight, depthwise_and_pointwise()[1].weight)
    assert network[0].weight.requires_grad


def test_prune_depthwise_with_threshold_one_prunes_nothing():
    network = depthwise_and_pointwise()
    prune_depthwise(network, 1)
    assert torch.equal(network[0].weight, depthwise_and_pointwise()[0].weight)


# ------------------------------------------------------------------------------------------------------- laws


def ternarized(network: MicroNet, threshold: float) -> MicroNet:
    """A copy of `network` with two values a layer; weights of less than `threshold` deviations are zero."""
    network = copy.deepcopy(network)
    for name in ternary_candidates(network, "cifar_micronet"):
        weight = network.get_parameter(name).data
        t = threshold * weight.std()
        weight.copy_(0.37 * (weight > t) - 0.21 * (weight < -t))
    return network


def costs(tally: Tally) -> list[tuple[float, float]]:
    return [(tally.scoring_params(group), tally.mflop(group)) for group in tally.groups]


def never_more(costs_of: list[tuple[float, float]], than: list[tuple[float, float]]) -> bool:
    return all(
        a <= b + 1e-9 for ours, theirs in zip(costs_of, than, strict=True) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("widths", [Widths(16, 16, 16), Widths(32, 16, 32)], ids=str)
def test_more_zeros_never_cost_more_and_ternary_never_more_than_dense(seed, widths):
    torch.manual_seed(seed)
    network = MicroNet(Layout(8, (2, 2), (8, 16), (1, 2), 0.0, 10), 1, 1, 10)
    network = network.requires_grad_(False)
    before = costs(count(network, "cifar_micronet", 16, widths))
    for threshold in (0.0, 0.5, 1.0, 2.0, 3.0, math.inf):
        after = costs(count(ternarized(network, threshold), "cifar_micronet", 16, widths))
        assert never_more(after, before), threshold
        before = after


def test_scoring_parameters_of_a_group_are_truncated():
    tally = Tally("published", Widths(), [Group("a", [Line("x", bits=63)])] * 2, params=0, truncate=True)
    assert tally.total_scoring_params == 2


def test_counting_leaves_torch_and_the_network_as_they_were(two_threads):
    network = small_micronet().train()
    before = copy.deepcopy(network.state_dict())
    RULERS["published"].count(network, "cifar_micronet", 8, Widths())
    assert torch.get_num_threads() == 2
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
