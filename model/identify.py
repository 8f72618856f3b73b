"""Find out which network a bare state dict belongs to, from its names and shapes alone."""

import re
from collections.abc import Mapping

import torch

from model import EFFICIENTNETS, LITES, build
from model.micronet import LAYOUTS, MAX_MULTIPLIER, scale_depth, scale_width


def nearest(state_dict: Mapping) -> tuple[dict | None, list[str]]:
    """Return the spec whose names and shapes come closest to `state_dict`, None if none does, and how they differ.

    Multipliers of MicroNet are the shortest decimals that give the same blocks and channels. Counters of
    BatchNorm (`num_batches_tracked`), which old files lack, do not matter.
    """
    best = None, []
    for spec in _guesses(state_dict):
        differences = mismatches(expected_state_dict(spec), state_dict)
        if not differences:
            return spec, []
        if best[0] is None or len(differences) < len(best[1]):
            best = spec, differences
    return best


def expected_state_dict(spec: Mapping) -> dict:
    """Names and shapes of the network that `spec` describes, as tensors that take no memory."""
    with torch.device("meta"):
        return build(dict(spec)).state_dict()


def mismatches(expected: Mapping, found: Mapping) -> list[str]:
    """Say how the names and shapes of two state dicts differ, a phrase each; empty if they do not."""

    def shapes(tensors: Mapping) -> dict:
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def lacking(names: Mapping, others: Mapping) -> list[str]:
        return [name for name in names if name not in others and not name.endswith("num_batches_tracked")]

    expected, found = shapes(expected), shapes(found)
    missing = [f"{name} is missing" for name in lacking(expected, found)]
    surplus = [f"{name} is not of this network" for name in lacking(found, expected)]
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
        with_se = any("_se_reduce" in name for name in state_dict)
        return [{"name": name, "num_classes": num_classes} for name in (EFFICIENTNETS if with_se else LITES)]
    if "layer1.0.bn3.weight" not in state_dict:
        return [{"name": "resnet20", "num_classes": num_classes}]

    blocks, channels = {}, {}
    for name, tensor in state_dict.items():
        if (match := re.fullmatch(r"layer(\d)\.(\d{1,3})\.conv2\.weight", name)) and tensor.ndim == 4:
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
    """The shortest decimal that `scale` turns `base` into `scaled` with; None if there is none."""
    for digits in range(4):
        step = 10**digits
        for numerator in range(1, int(MAX_MULTIPLIER) * step + 1):
            multiplier = numerator / step
            if all(scale(b, multiplier) == s for b, s in zip(base, scaled)):
                return multiplier
    return None
