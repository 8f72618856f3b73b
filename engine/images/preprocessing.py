"""Photographs as a network wants them: resized and cropped as those it was trained on, `[size, size, 3]` of uint8.

They are normalised once they are on the device: a quarter of the bytes to hand on.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.registry import Preprocessing

Transform = Callable[[Image.Image], Tensor]


def for_training(size: int) -> Transform:
    """ImageNet's augmentation: a random part of the photograph, at `size` px, perhaps mirrored."""
    from torchvision import transforms  # imports half of torch: no earlier than it is needed

    return transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), _pixels])


def for_validation(preprocessing: Preprocessing, size: int) -> Transform:
    """The centre of the photograph, `size` px wide and high."""
    from torchvision import transforms

    interpolation = transforms.InterpolationMode(preprocessing.interpolation)
    resize = transforms.Resize(preprocessing.shorter_side(size), interpolation)
    return transforms.Compose([resize, transforms.CenterCrop(size), _pixels])


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))
