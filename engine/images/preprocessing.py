"""How a network wants its images: resized, cropped and normalised as those it was trained on."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from engine.images.augment import CIFAR, Statistics
from model import EFFICIENTNETS, LITES

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """Photographs as one family of networks sees them.

    Attributes:
        shorter_side: from the size of the centre crop in validation to what the shorter side is resized to, pixels.
        interpolation: of that resizing.
        photographs: what they are normalised by.
        small_images: what those are normalised by; they are neither resized nor cropped.
    """

    shorter_side: Callable[[int], int]
    interpolation: InterpolationMode
    photographs: Statistics
    small_images: Statistics

    def training(self, size: int) -> Transform:
        """ImageNet's augmentation: a random part of the photograph, at `size` px, perhaps mirrored."""
        return transforms.Compose(
            [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *self._to_normal()]
        )

    def validation(self, size: int) -> Transform:
        """The centre of the photograph, `size` px wide and high."""
        resize = transforms.Resize(self.shorter_side(size), self.interpolation)
        return transforms.Compose([resize, transforms.CenterCrop(size), *self._to_normal()])

    def _to_normal(self) -> list:
        return [transforms.ToTensor(), transforms.Normalize(*self.photographs)]


OF_IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of its training images
OF_LITE = Statistics((127 / 255,) * 3, (128 / 255,) * 3)  # (x - 127) / 128

IMAGENET = Preprocessing(lambda size: size * 8 // 7, InterpolationMode.BILINEAR, OF_IMAGENET, CIFAR)
# as the 2019 programs evaluated it
EFFICIENTNET = Preprocessing(lambda size: size, InterpolationMode.BICUBIC, OF_IMAGENET, OF_IMAGENET)
# a crop that leaves 16 px off each side: EfficientNet-Lite's published evaluation
EFFICIENTNET_LITE = Preprocessing(lambda size: size + 32, InterpolationMode.BICUBIC, OF_LITE, OF_LITE)


def preprocessing_of(model: str) -> Preprocessing:
    """The preprocessing that the network named `model` was trained with."""
    if model in LITES:
        return EFFICIENTNET_LITE
    return EFFICIENTNET if model in EFFICIENTNETS else IMAGENET
