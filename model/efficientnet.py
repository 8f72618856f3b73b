"""EfficientNet (Tan & Le, arXiv:1905.11946) as efficientnet_pytorch builds it, and EfficientNet-Lite made of it.

Without an image size, that package computes TensorFlow's "same" padding from each image, which is right at every size;
with one, it fixes the padding of all layers for that size.
"""

import math
import warnings

from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import get_model_params
from torch import nn


def efficientnet(name: str, num_classes: int = 1000) -> EfficientNet:
    """Build EfficientNet `name`. Images [N, 3, H, W] in, logits [N, num_classes] out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EfficientNet.from_name(name, image_size=None, num_classes=num_classes)


def efficientnet_lite1(num_classes: int = 1000) -> EfficientNet:
    """Build EfficientNet-Lite1 (Liu, TensorFlow blog, March 2020). Images and logits as EfficientNet's.

    It is B1 without squeeze-and-excitation, with ReLU6 in place of swish, and with a first and a last stage that
    depth scaling leaves alone.
    """
    blocks, parameters = get_model_params("efficientnet-b1", {"num_classes": num_classes})
    first, *scaled, last = [block._replace(se_ratio=None) for block in blocks]
    scaled = [block._replace(num_repeat=math.ceil(parameters.depth_coefficient * block.num_repeat)) for block in scaled]
    network = EfficientNet([first, *scaled, last], parameters._replace(depth_coefficient=None, image_size=None))
    for module in network.modules():
        if hasattr(module, "_swish"):
            module._swish = nn.ReLU6()
    return network
