"""Photographs as a network wants them: resized, cropped and normalised as those it was trained on."""

from collections.abc import Callable

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from model.registry import Preprocessing

Transform = Callable[[Image.Image], Tensor]


def for_training(preprocessing: Preprocessing, size: int) -> Transform:
    """ImageNet's augmentation: a random part of the photograph, at `size` px, perhaps mirrored."""
    return transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *_to_normal(preprocessing)]
    )


def for_validation(preprocessing: Preprocessing, size: int) -> Transform:
    """The centre of the photograph, `size` px wide and high."""
    resize = transforms.Resize(preprocessing.shorter_side(size), InterpolationMode(preprocessing.interpolation))
    return transforms.Compose([resize, transforms.CenterCrop(size), *_to_normal(preprocessing)])


def _to_normal(preprocessing: Preprocessing) -> list:
    return [transforms.ToTensor(), transforms.Normalize(*preprocessing.photographs)]
