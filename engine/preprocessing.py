"""How a network wants its photographs: resized, cropped and normalised as those it was trained on."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from model import EFFICIENTNETS, LITES

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """Photographs as one family of networks sees them.

    Attributes:
        shorter_side: from the size of the centre crop in validation to what the shorter side is resized to, pixels.
        interpolation: of that resizing.
        mean, std: subtracted, then divided by: red, green and blue on the scale [0, 1].
    """

    shorter_side: Callable[[int], int]
    interpolation: InterpolationMode
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of ImageNet's training images, as is std
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

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
        return [transforms.ToTensor(), transforms.Normalize(self.mean, self.std)]


IMAGENET = Preprocessing(lambda size: size * 8 // 7, InterpolationMode.BILINEAR)
EFFICIENTNET = Preprocessing(lambda size: size, InterpolationMode.BICUBIC)  # as the 2019 programs evaluated it
# (x - 127) / 128, and a crop that leaves 16 px off each side: EfficientNet-Lite's published evaluation
EFFICIENTNET_LITE = Preprocessing(
    lambda size: size + 32, InterpolationMode.BICUBIC, mean=(127 / 255,) * 3, std=(128 / 255,) * 3
)


def preprocessing_of(model: str) -> Preprocessing:
    """The preprocessing that the network named `model` was trained with."""
    if model in LITES:
        return EFFICIENTNET_LITE
    return EFFICIENTNET if model in EFFICIENTNETS else IMAGENET
