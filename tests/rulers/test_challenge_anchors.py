"""The challenge ruler on whole networks: the challenge's baselines, and the closed forms of `published`."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from helpers.networks import reference_network
from helpers.tallies import FULL, WIDTHS
from rulers import published
from rulers.challenge import count
from rulers.graph import trace
from rulers.published import efficientnet, residual
from rulers.tally import TASKS, Tally

# ------------------------------------------------------------------------------ the challenge's baselines


class WideBlock(nn.Module):
    """Two BatchNorms, ReLUs and 3x3 convolutions (Zagoruyko & Komodakis, arXiv:1605.07146)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        same = channels_in == channels_out
        self.shortcut = None if same else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


def wide_resnet_28_10() -> nn.Sequential:
    blocks, channels = [], 16
    for width, stride in ((160, 1), (320, 2), (640, 2)):
        for i in range(4):
            blocks.append(WideBlock(channels, width, stride if i == 0 else 1))
            channels = width
    head = (nn.BatchNorm2d(640), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(640, 100))
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), *blocks, *head)


def test_wide_resnet_is_the_baseline_of_cifar_100():
    tally = count(wide_resnet_28_10(), 32, FULL)
    task = TASKS["CIFAR-100"]
    assert tally.total_scoring_params == pytest.approx(task.base_params, rel=1e-3)
    assert tally.total_mflop * 1e6 == pytest.approx(task.base_ops, rel=1e-3)
    assert tally.score(task) == pytest.approx(2, abs=2e-3)
    assert tally.uncounted == []


def test_mobilenet_v2_is_about_the_baseline_of_imagenet():
    """The baseline is the paper's: 6.9M parameters, 585M multiply-accumulates as 1170M operations.

    torchvision's network has 6.11M parameters (TensorFlow's 6.06M), 6.08M once BatchNorms are merged, and
    582M multiply-accumulates. What runs besides them, ReLU6 above all, makes up the 9M operations more.
    """
    torch.manual_seed(0)  # some draws of 6 million weights have a zero
    network = torchvision.models.mobilenet_v2(width_mult=1.4)
    tally = count(network, 224, FULL)
    mflop = {group.name: tally.mflop(group) for group in tally.groups}
    assert mflop == {
        "convolutions": pytest.approx(2 * 580.403726),
        "linear layers": pytest.approx(2 * 1.792),
        "activations": pytest.approx(8.754928),
        "poolings": pytest.approx(1792 * 49 / 1e6),
        "additions": pytest.approx(0.302624),
    }
    assert 1170 < tally.total_mflop < 1200
    assert tally.params == 6_108_776
    scales = sum(module.num_features for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    assert tally.total_scoring_params == tally.params - scales
    assert tally.uncounted == []


# -------------------------------------------------------------------- against the closed forms of `published`

SIZES = {"cifar_micronet": 32, "imagenet_micronet": 200, "resnet20": 32}
SIZES |= {"efficientnet-b1": 256, "efficientnet-b4": 380}


def without_dead_filters(model: str) -> nn.Module:
    """The network of a reference checkpoint, but with a weight in each filter that has none."""
    network = copy.deepcopy(reference_network(model))
    for weight in (parameter.data for parameter in network.parameters() if parameter.ndim == 4):
        weight[(weight == 0).flatten(1).all(dim=1), 0, 0, 0] = weight.max()
    return network


def resolutions(network: nn.Module, size: int) -> dict[str, tuple[int, int]]:
    """Height of the input and of the output of every convolution, by its path."""
    found = {}
    for node in trace(network, size):
        if node.operation == "convolution":
            heights = node.arguments["input"].shape[2], node.output.shape[2]
            found[node.arguments["weight"].stored.name.removesuffix(".weight")] = heights
    return found


def bits_and_mflop(tally: Tally) -> tuple[float, float]:
    return sum(group.total("bits") for group in tally.groups), tally.total_mflop


@pytest.mark.parametrize("model", ["efficientnet-b1", pytest.param("efficientnet-b4", marks=pytest.mark.robustness)])
def test_efficientnet_agrees_with_published_but_for_its_quirks(model, monkeypatch):
    """The quirks: resolutions, skip additions, and two masks where signs need a bit for non-zeros only."""
    widths, size = WIDTHS, SIZES[model]
    network = without_dead_filters(model)
    found = resolutions(network, size)

    def outputs(layer, div, size):
        block, _, part = layer.name.rpartition(".")
        return found[f"{block}._depthwise_conv" if part.startswith("_se_") else layer.name][1]

    monkeypatch.setattr(efficientnet, "_outputs", outputs)
    closed_form, tally = published.count(network, model, size, widths), count(network, size, widths)
    bits, mflop = bits_and_mflop(closed_form)
    for name, layer in network.named_modules():
        if name.endswith(("_expand_conv", "_project_conv", "_conv_head")):
            bits += int(layer.weight.count_nonzero()) - layer.weight.numel()
    additions = next(group for group in tally.groups if group.name == "additions")
    mflop += tally.mflop(additions) - closed_form.mflop(closed_form.groups[-1])
    assert bits_and_mflop(tally) == (bits, pytest.approx(mflop, rel=1e-12))
    assert (tally.numel, tally.zeros_percent) == (closed_form.numel, closed_form.zeros_percent)
    assert tally.uncounted == []


@pytest.mark.parametrize("model", [pytest.param("cifar_micronet", marks=pytest.mark.robustness), "imagenet_micronet"])
def test_micronet_agrees_with_published_but_for_its_quirks(model, monkeypatch):
    """The quirks: resolutions, residual additions, BatchNorms before convolutions, two masks for signs."""
    widths, size = WIDTHS, SIZES[model]
    network = without_dead_filters(model)
    found = resolutions(network, size)
    convolutions = [name for name in found if ".conv" in name]
    in_order = iter([name for name in found if "shortcut" in name] + convolutions)
    monkeypatch.setattr(residual, "out_size", lambda *_, **__: found[next(in_order)][1])
    closed_form, tally = published.count(network, model, size, widths), count(network, size, widths)

    bits, mflop = bits_and_mflop(closed_form)
    for name in convolutions:
        layer = network.get_submodule(name)
        bits += int(layer.weight.count_nonzero()) - layer.weight.numel()
        if name.endswith("conv1"):
            before = found[name][0] ** 2 * layer.in_channels  # elements that the block's first BatchNorm sees
            after = found[name][1] ** 2 * layer.out_channels  # elements that the block adds
            # the form has a bias for each channel before, and an addition for each element after
            bits += layer.in_channels * widths.value
            mflop += (before * widths.mul + (before - after) * widths.add) / 32e6
            mflop += after * widths.add / 32e6
    (pool,) = (line for group in tally.groups for line in group.lines if line.name == "mean")
    mflop += (pool.adds - closed_form.groups[2].lines[-1].adds) * widths.add / 32e6  # its resolution
    assert bits_and_mflop(tally) == (bits, pytest.approx(mflop, rel=1e-12))
    assert (tally.numel, tally.zeros_percent) == (closed_form.numel, closed_form.zeros_percent)
    assert tally.uncounted == []
