"""Which training images are held out, so that epochs and networks are chosen on images that are no test images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.program.errors import UserError


def held_out(labels: Tensor, share: float, classes: Sequence[str]) -> Tensor:
    """Which of the images with `labels` `[N]` are held out: booleans `[N]`, of each class `share`, but at least one.

    It depends on the labels alone, so that runs with other seeds choose on the same images. UserError where a class
    has fewer than two images.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(classes):
        indices = (labels == label).nonzero().flatten()
        if len(indices) < 2:
            raise UserError(f"--holdout: {len(indices)} training images of {name} are too few to hold one out")
        number = min(max(1, round(share * len(indices))), len(indices) - 1)
        held[indices[torch.randperm(len(indices), generator=generator)[:number]]] = True
    return held
