"""Photographs as a network wants them: resized and cropped as those it was trained on, `[size, size, 3]` of uint8.

They are normalised once they are on the device: a quarter of the bytes to hand on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.images.decoding import Box
from model.registry import Preprocessing

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class RandomPart:
    """ImageNet's augmentation: a random part of a photograph, 8 to 100% of it, for an image of `size` px."""

    size: int

    def __call__(self, image: Image.Image) -> tuple[Box, int]:
        from torchvision import transforms  # imports half of torch: no earlier than it is needed

        crop = transforms.RandomResizedCrop(self.size)
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        return Box(left, top, left + width, top + height), self.size


def for_training(size: int) -> Transform:
    """A `RandomPart` as an image of `size` px, perhaps mirrored."""
    from torchvision import transforms

    return transforms.Compose([transforms.Resize((size, size)), transforms.RandomHorizontalFlip(), _pixels])


def for_validation(preprocessing: Preprocessing, size: int) -> Transform:
    """The centre of the photograph, `size` px wide and high."""
    from torchvision import transforms

    interpolation = transforms.InterpolationMode(preprocessing.interpolation)
    resize = transforms.Resize(preprocessing.shorter_side(size), interpolation)
    return transforms.Compose([resize, transforms.CenterCrop(size), _pixels])


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))
