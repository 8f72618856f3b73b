"""Find out which network a bare state dict belongs to, from its names and shapes alone."""

import re
from collections.abc import Mapping

import torch

from model import EFFICIENTNETS, build
from model.micronet import LAYOUTS, scale_depth, scale_width


def identify(state_dict: Mapping) -> dict | None:
    """Return the spec of a network that has exactly the names and shapes of `state_dict`, or None.

    Multipliers of MicroNet are the shortest decimals that give the same blocks and channels. Counters of
    BatchNorm (`num_batches_tracked`), which old files lack, do not matter.
    """
    for spec in _guesses(state_dict):
        with torch.device("meta"):  # names and shapes only: nothing of the size that the file claims
            network = build(spec)
        if not mismatches(network.state_dict(), state_dict):
            return spec
    return None


def mismatches(expected: Mapping, found: Mapping) -> list[str]:
    """Say how the names and shapes of two state dicts differ, a phrase each; empty if they do not."""

    def shapes(tensors: Mapping) -> dict:
        return {name: tuple(t.shape) for name, t in tensors.items() if not name.endswith("num_batches_tracked")}

    expected, found = shapes(expected), shapes(found)
    missing = [f"{name} is missing" for name in expected if name not in found]
    surplus = [f"{name} is not of this network" for name in found if name not in expected]
    other = [
        f"{name} is {_shape(found[name])} where {_shape(expected[name])} is needed"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    return other + missing + surplus


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _guesses(state_dict: Mapping) -> list[dict]:
    """Specs worth building, told by the telling names; at most four."""
    classifier = state_dict.get("_fc.weight" if "_fc.weight" in state_dict else "linear.weight")
    if classifier is None or classifier.ndim != 2:
        return []
    num_classes = classifier.shape[0]
    if "_conv_stem.weight" in state_dict:
        return [{"name": name, "num_classes": num_classes} for name in EFFICIENTNETS]
    if "layer1.0.bn3.weight" not in state_dict:
        return [{"name": "resnet20", "num_classes": num_classes}]

    blocks, channels = {}, {}
    for name, tensor in state_dict.items():
        if match := re.fullmatch(r"layer(\d+)\.(\d+)\.conv2\.weight", name):
            stage, block = int(match[1]), int(match[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
            channels[stage] = tensor.shape[0]
    guesses = []
    for model, layout in LAYOUTS.items():
        if sorted(blocks) == list(range(1, len(layout.blocks) + 1)):
            depth = _multiplier(scale_depth, layout.blocks, [blocks[s] for s in sorted(blocks)])
            width = _multiplier(scale_width, layout.channels, [channels[s] for s in sorted(channels)])
            if depth and width:
                guesses.append({"name": model, "depth": depth, "width": width, "num_classes": num_classes})
    return guesses


def _multiplier(scale, base: tuple[int, ...], scaled: list[int]) -> float | None:
    """The shortest decimal, up to 32, that `scale` turns `base` into `scaled` with; None if there is none."""
    for digits in range(4):
        step = 10**digits
        for numerator in range(1, 32 * step + 1):
            multiplier = numerator / step
            if all(scale(b, multiplier) == s for b, s in zip(base, scaled)):
                return multiplier
    return None
