"""The networks: sizes, names and shapes of 2019, what their blocks compute, and how bare tensors are recognised."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model.identify
from helpers.networks import TINY
from model import ROWS, build
from model.identify import expected_state_dict, nearest
from model.micronet import LAYOUTS, scale_depth, scale_width
from model.names import mismatches
from model.selection import is_ternary, pruning_candidates, ternary_candidates

CIFAR = {"name": "cifar_micronet", "depth": 1.4**3.5, "width": 1.2**3.5, "num_classes": 100}
IMAGENET = {"name": "imagenet_micronet", "depth": 1.2, "width": 1.3, "num_classes": 1000}


def meta(spec: dict) -> nn.Module:
    """The network without memory for its tensors."""
    with torch.device("meta"):
        return build(spec)


def shapes(spec: dict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in expected_state_dict(spec).items()}


# ------------------------------------------------------------------------------------- names, shapes, sizes


@pytest.mark.parametrize(
    "spec, parameters",
    [
        (CIFAR, 8_055_124),
        ({"name": "cifar_micronet", "depth": 1, "width": 1, "num_classes": 100}, 668_660),
        (IMAGENET, 13_916_576),
        ({"name": "resnet20", "num_classes": 10}, 269_722),
        ({"name": "efficientnet-b1", "num_classes": 1000}, 7_794_184),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else f"{value:,}",
)
def test_parameters(spec, parameters):
    assert sum(p.numel() for p in meta(spec).parameters()) == parameters


def norm(name: str) -> set[str]:
    entries = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{name}.{entry}" for entry in entries}


@pytest.mark.parametrize(
    "name, blocks, with_shortcut",
    [
        ("cifar_micronet", (7, 7, 7), {2, 3}),
        ("imagenet_micronet", (1, 2, 2, 3, 3, 4, 1), {1, 2, 3, 4, 5, 6, 7}),
    ],
)
def test_micronet_has_the_names_of_2019(name, blocks, with_shortcut):
    names = {"conv1.weight", *norm("bn1"), "linear.weight", "linear.bias"}
    for stage, number in enumerate(blocks, start=1):
        for i in range(number):
            block = f"layer{stage}.{i}"
            names |= {f"{block}.conv1.weight", f"{block}.conv2.weight"}
            names |= norm(f"{block}.bn1") | norm(f"{block}.bn2") | norm(f"{block}.bn3")
        if stage in with_shortcut:
            names |= {f"layer{stage}.0.shortcut.0.weight", *norm(f"layer{stage}.0.shortcut.1")}
    assert set(meta({"name": name}).state_dict()) == names


def test_resnet20_has_the_names_of_the_usual_checkpoints():
    names = {"conv1.weight", *norm("bn1"), "linear.weight", "linear.bias"}
    for block in (f"layer{stage}.{i}" for stage in (1, 2, 3) for i in (0, 1, 2)):
        names |= {f"{block}.conv1.weight", f"{block}.conv2.weight", *norm(f"{block}.bn1"), *norm(f"{block}.bn2")}
    assert set(meta({"name": "resnet20"}).state_dict()) == names


@pytest.mark.parametrize(
    "name, stem, channels, sizes",
    [
        ("cifar_micronet", 16, (16, 32, 64), (32, 16, 8)),
        ("imagenet_micronet", 32, (16, 24, 40, 80, 112, 192, 320), (16, 16, 8, 4, 2, 2, 2)),
    ],
)
def test_channels_and_resolution_of_each_stage(name, stem, channels, sizes):
    network = meta({"name": name})
    x = network.bn1(network.conv1(torch.zeros(1, 3, 32, 32, device="meta")))
    assert tuple(x.shape) == (1, stem, 32, 32)
    for stage, (number, size) in enumerate(zip(channels, sizes, strict=True), start=1):
        x = getattr(network, f"layer{stage}")(x)
        assert tuple(x.shape) == (1, number, size, size)


@pytest.mark.parametrize("name, rate", [("cifar_micronet", 0.2), ("imagenet_micronet", 0.0)])
def test_dropout(name, rate):
    assert {m.p for m in meta({"name": name}).modules() if isinstance(m, nn.Dropout)} == {rate}


@pytest.mark.parametrize("name, classes", [("cifar_micronet", 100), ("imagenet_micronet", 1000), ("resnet20", 10)])
def test_number_of_classes(name, classes):
    assert shapes({"name": name})["linear.bias"] == (classes,)
    assert shapes({"name": name, "num_classes": 7})["linear.bias"] == (7,)


@pytest.mark.parametrize(
    "blocks, multiplier, scaled", [(7, 1, 7), (7, 3.2468, 23), (7, 2**0.5 * 2**0.5, 14), (3, 1e-12, 1)]
)
def test_depth_is_rounded_up(blocks, multiplier, scaled):
    assert scale_depth(blocks, multiplier) == scaled


@pytest.mark.parametrize("channels, multiplier, scaled", [(16, 1, 16), (16, 0.1, 8), (64, 1.8929, 120), (12, 1, 16)])
def test_width_is_a_multiple_of_8(channels, multiplier, scaled):
    assert scale_width(channels, multiplier) == scaled


def test_width_is_near_and_never_10_percent_below():
    for channels in (16, 24, 32, 40, 64, 80, 112, 192, 320):
        for multiplier in torch.linspace(0.5, 4, 200).tolist():
            scaled = scale_width(channels, multiplier)
            assert scaled % 8 == 0 and scaled / (channels * multiplier) >= 0.9 and scaled - channels * multiplier <= 8


# ------------------------------------------------------------------------------------- what the networks compute


@pytest.fixture
def tiny():
    """A tiny MicroNet whose BatchNorms do something, in evaluation mode."""
    torch.manual_seed(0)
    network = build(TINY).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
    return network


def test_a_block_has_one_relu_and_none_after_the_sum(tiny):
    x = torch.randn(2, 8, 6, 6)
    block = tiny.layer2[0]
    out = block.bn2(block.conv1(block.bn1(x)))
    out = block.bn3(block.conv2(F.relu(out)))
    shortcut = block.shortcut[1](F.conv2d(x, block.shortcut[0].weight, stride=2))
    torch.testing.assert_close(block(x), out + shortcut)
    assert (block(x) < 0).any()


def test_a_block_of_equal_channels_adds_its_input(tiny):
    x = torch.randn(2, 8, 6, 6)
    block = tiny.layer1[0]
    nn.init.zeros_(block.bn3.weight)
    torch.testing.assert_close(block(x), x + block.bn3.bias.view(1, -1, 1, 1))


def test_stem_and_classifier(tiny):
    images = torch.randn(2, 3, 32, 32)
    x = F.relu(tiny.bn1(tiny.conv1(images)))
    x = tiny.layer3(tiny.layer2(tiny.layer1(x)))
    pooled = F.relu(x).mean(dim=(2, 3))
    torch.testing.assert_close(tiny(images), pooled @ tiny.linear.weight.T + tiny.linear.bias)


def test_micronets_weights_begin_as_in_2019():
    """Kaiming normal by the fan-in, of the classifier too: 2 / (27 inputs) and 2 / (120 inputs)."""
    network = build({"name": "cifar_micronet", "depth": 1.4**3.5 / 23, "width": 1.2**3.5, "num_classes": 100})
    stds = {
        "conv1.weight": (2 / 27) ** 0.5,  # 0.27; drawn in 2019: .263
        "layer1.0.conv1.weight": (2 / (32 * 9)) ** 0.5,
        "layer2.0.shortcut.0.weight": (2 / 32) ** 0.5,
        "linear.weight": (2 / 120) ** 0.5,  # 0.13
    }
    drawn = {name: network.get_parameter(name).std().item() for name in stds}
    assert drawn == pytest.approx(stds, rel=0.05)


def test_resnet20_pads_new_channels_with_zeros_on_both_sides():
    block = build({"name": "resnet20"}).layer2[0]
    x = torch.randn(2, 16, 8, 8)
    shortcut = block.shortcut(x)
    assert tuple(shortcut.shape) == (2, 32, 4, 4)
    assert torch.equal(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert not shortcut[:, :8].any() and not shortcut[:, 24:].any()


@pytest.mark.parametrize("spec", [TINY, {**IMAGENET, "depth": 0.1, "width": 0.3}, {"name": "resnet20"}])
@pytest.mark.parametrize("size", [17, 32])
def test_all_parameters_learn_at_any_image_size(spec, size):
    network = build(spec)
    network(torch.randn(2, 3, size, size)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_equal_seeds_give_equal_networks():
    networks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        networks.append(build(TINY).conv1.weight)
    assert torch.equal(networks[0], networks[1]) and not torch.equal(networks[0], networks[2])


@pytest.mark.parametrize("spec", [{"name": "resnet50"}, {"name": ""}])
def test_unknown_models_are_named(spec):
    with pytest.raises(KeyError, match="known are cifar_micronet"):
        build(spec)


@pytest.mark.parametrize("multiplier", [0, -1, 32.1, 14**3.5, float("inf"), float("nan")])
@pytest.mark.parametrize("part", ["depth", "width"])
def test_absurd_multipliers_are_refused_before_anything_is_built(part, multiplier):
    with pytest.raises(ValueError, match=f"{part} multiplier"):
        build({**TINY, part: multiplier})


# ------------------------------------------------------------------------------------- which layers EC2T may touch


@pytest.mark.parametrize("spec, number", [(CIFAR, 2 * 3 * 23), (IMAGENET, 2 * 23), ({"name": "resnet20"}, 18)])
def test_ternary_layers_are_the_convolutions_inside_the_blocks(spec, number):
    names = ternary_candidates(meta(spec), spec["name"])
    assert len(names) == number
    assert all(re.fullmatch(r"layer\d\.\d+\.conv[12]\.weight", name) for name in names)


def test_layers_of_efficientnet():
    network = meta({"name": "efficientnet-b1"})
    ternary = ternary_candidates(network, "efficientnet-b1")
    kinds = [name.split(".")[-2] for name in ternary]
    assert {kind: kinds.count(kind) for kind in kinds} == {"_project_conv": 23, "_expand_conv": 21, "_conv_head": 1}


def test_pruning_leaves_ternary_layers_out():
    network = build(TINY)
    names = ternary_candidates(network, TINY["name"])
    weight = dict(network.named_parameters())[names[0]]
    with torch.no_grad():
        weight.sign_().mul_(0.5)
    assert pruning_candidates(network, TINY["name"]) == names[1:]


def test_pruned_layers_of_efficientnet():
    names = pruning_candidates(build({"name": "efficientnet-b1", "num_classes": 10}), "efficientnet-b1")
    kinds = [name.split(".")[-2] for name in names]
    assert {kind: kinds.count(kind) for kind in kinds} == {"_se_reduce": 23, "_se_expand": 23, "_fc": 1}


@pytest.mark.parametrize(
    "values, ternary",
    [
        ([0.0, 0.5, -0.2, 0.5], True),
        ([0.5, 0.5], True),
        ([0.0, 0.0], True),
        ([0.5, -0.5, 0.4], False),
        ([-0.1, -0.2], False),
    ],
)
def test_ternary_is_at_most_one_value_a_side(values, ternary):
    assert is_ternary(torch.tensor(values)) is ternary


# ------------------------------------------------------------------------------------- recognising bare tensors


def identify(tensors: dict) -> dict | None:
    """The spec of a network that has exactly these names and shapes."""
    spec, differences = nearest(tensors)
    return None if differences else spec


@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        CIFAR,
        IMAGENET,
        {**IMAGENET, "depth": 2.7, "width": 0.9, "num_classes": 3},
        {"name": "resnet20", "num_classes": 10},
        *({"name": name, "num_classes": 12} for name in ROWS if name.startswith("efficientnet")),
    ],
    ids=lambda spec: spec["name"],
)
def test_names_and_shapes_tell_the_network(spec):
    found = identify(expected_state_dict(spec))
    assert (found["name"], found["num_classes"]) == (spec["name"], spec["num_classes"])
    assert shapes(found) == shapes(spec)


def test_multipliers_are_the_shortest_decimals():
    assert identify(expected_state_dict({**CIFAR, "depth": 1, "width": 1.04})) == {**CIFAR, "depth": 1, "width": 1}
    assert identify(expected_state_dict(CIFAR)) == {**CIFAR, "depth": 3.2, "width": 1.9}


def test_counters_of_batches_may_lack():
    tensors = {k: v for k, v in expected_state_dict(TINY).items() if not k.endswith("num_batches_tracked")}
    assert shapes(identify(tensors)) == shapes(TINY)


def changed(spec: dict, changes: dict) -> dict:
    """Names and shapes of a network with some tensors replaced, or removed where None stands for them."""
    return {k: v for k, v in {**expected_state_dict(spec), **changes}.items() if v is not None}


DAMAGES = {
    "layer3.0.conv2.weight is missing": {"layer3.0.conv2.weight": None},
    "head.weight is not of this network": {"head.weight": torch.zeros(1)},
    "bn1.bias is 9 where 8 is needed": {"bn1.bias": torch.zeros(9)},
    "layer1.0.conv2.weight is a scalar where 8x8x3x3 is needed": {"layer1.0.conv2.weight": torch.tensor(0.0)},
    "bn1.num_batches_tracked is 2 where a scalar is needed": {"bn1.num_batches_tracked": torch.zeros(2)},
}


@pytest.mark.parametrize("said, changes", DAMAGES.items(), ids=DAMAGES)
def test_one_wrong_tensor_is_told(said, changes):
    spec = {**TINY, "depth": 0.2}  # 2-2-2 blocks: stages stay countable without one convolution
    tensors = changed(spec, changes)
    assert identify(tensors) is None
    found, differences = nearest(tensors)
    assert shapes(found) == shapes(spec) and differences == [said]


KERNEL = torch.zeros(8, 8, 3, 3)
HOSTILE = {
    "nothing": {},
    "one tensor": {"conv1.weight": KERNEL},
    "a flat classifier": {"linear.weight": torch.zeros(10)},
    "a scalar classifier": {"_fc.weight": torch.tensor(0.0), "_conv_stem.weight": KERNEL},
    "no classifier": changed(TINY, {"linear.weight": None}),
    "no convolutions": changed(TINY, {f"layer{stage}.0.conv2.weight": None for stage in (1, 2, 3)}),
    "no third BatchNorm": changed(TINY, {"layer1.0.bn3.weight": None}),
    "block 999,999,999": changed(TINY, {"layer1.999999999.conv2.weight": KERNEL}),
    "block of 9,999 digits": changed(TINY, {f"layer1.{'9' * 9999}.conv2.weight": KERNEL}),
    "2^60 blocks": changed(TINY, {f"layer{stage}.{2**60}.conv2.weight": KERNEL for stage in (1, 2, 3)}),
    "980 blocks": changed(TINY, {f"layer{stage}.979.conv2.weight": KERNEL for stage in (1, 2, 3)}),
    "2^40 channels": changed(
        TINY, {f"layer{s + 1}.0.conv2.weight": KERNEL[0].expand(2 ** (40 + s), 8, 3, 3) for s in range(3)}
    ),
    "2^50 classes": changed(TINY, {"linear.weight": torch.zeros(1).expand(2**50, 32)}),
}


@pytest.mark.parametrize("tensors", HOSTILE.values(), ids=HOSTILE)
def test_hostile_names_and_shapes_build_nothing_large(tensors, monkeypatch):
    built = []

    def noted_build(spec: dict) -> nn.Module:
        built.append(spec)
        network = build(spec)
        assert all(p.is_meta for p in network.parameters()), "memory was taken for a size that the file claims"
        return network

    monkeypatch.setattr(model.identify, "build", noted_build)
    assert identify(tensors) is None
    assert all(spec.get("depth", 1) <= 32 and spec.get("width", 1) <= 32 for spec in built)


def test_mismatches_of_equal_networks_are_none():
    assert mismatches(expected_state_dict(TINY), build(TINY).state_dict()) == []


def test_layouts_and_models_know_each_other():
    assert set(LAYOUTS) <= set(ROWS)


@pytest.mark.parametrize("size", [224, 240, 256])
@pytest.mark.parametrize("name", ["efficientnet-b1", "efficientnet-lite1"])
def test_efficientnets_pad_the_same_at_every_size(name, size):
    """As TensorFlow does: outputs are ceil(input / stride), and an odd pixel of padding comes last."""
    network, seen = build({"name": name}).eval(), []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, inputs, output: seen.append((conv, inputs[0], output)))
    with torch.no_grad():
        network(torch.randn(1, 3, size, size))
    for conv, x, output in seen:
        (k, _), (stride, _), height = conv.kernel_size, conv.stride, x.shape[-1]
        total = max((math.ceil(height / stride) - 1) * stride + k - height, 0)
        padded = F.pad(x, [total // 2, total - total // 2] * 2)
        assert torch.equal(output, F.conv2d(padded, conv.weight, conv.bias, stride, groups=conv.groups))
