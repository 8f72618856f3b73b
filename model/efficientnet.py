"""EfficientNet (Tan & Le, arXiv:1905.11946) as efficientnet_pytorch builds it."""

import warnings

from efficientnet_pytorch import EfficientNet


def efficientnet(name: str, num_classes: int = 1000) -> EfficientNet:
    """Build EfficientNet `name`. Images [N, 3, H, W] in, logits [N, num_classes] out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EfficientNet.from_name(name, num_classes=num_classes)


def native_image_size(name: str) -> int:
    """The image size in pixels that EfficientNet `name` was designed for, 240 for B1."""
    return EfficientNet.get_image_size(name)
