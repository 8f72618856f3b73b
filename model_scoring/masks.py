"""Ternary layers as files of their own: two bit masks and two values, or a sparse COO tensor."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.store.checkpoint import Content, read, save


def masks(weight: Tensor) -> Content:
    """A ternary weight as masks of its positive and its negative elements, eight a byte, and their two values."""
    positive, negative = weight > 0, weight < 0
    return {
        "shape": list(weight.shape),
        "positive": _pack(positive),
        "negative": _pack(negative),
        "w_p": weight.max().clamp(min=0).clone(),
        "w_n": (-weight.min()).clamp(min=0).clone(),
    }


def from_masks(layer: Content) -> Tensor:
    """The weight that `masks` was made of."""
    shape = layer["shape"]
    weight = torch.zeros(shape, dtype=layer["w_p"].dtype)
    weight[_unpack(layer["positive"], shape)] = layer["w_p"]
    weight[_unpack(layer["negative"], shape)] = -layer["w_n"]
    return weight


def save_layer(weight: Tensor, path: Path, coo: bool) -> None:
    """Write a ternary weight to `path`, as masks or as a sparse COO tensor."""
    save({"coo": weight.to_sparse()} if coo else masks(weight), path)


def load_layer(path: Path) -> Tensor:
    """Read back what `save_layer` wrote, as a dense tensor."""
    layer = read(path)
    return layer["coo"].to_dense() if "coo" in layer else from_masks(layer)


def _pack(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.flatten().numpy()))


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=int(np.prod(shape)))
    return torch.from_numpy(bits.astype(bool)).reshape(shape)
