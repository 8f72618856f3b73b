"""The `published` ruler: the closed forms that the EC2T authors counted with in 2019.

Marban et al., "Learning Sparse & Ternary Neural Networks with Entropy-Constrained Trained Ternarization
(EC2T)", arXiv:2004.01077, entry to the MicroNet Challenge at NeurIPS 2019. Its scores, 0.0242 for CIFAR-100
and 0.5821 for ImageNet, can be compared on this ruler only.

The forms are kept as they were used. Where they depart from what the network does, the comment or docstring
says `Quirk`. Letters, everywhere in this package:

    size    height and width of the input image in pixels (S)
    div     resolution of a layer's input relative to the image, as the forms assume it
    out     height and width of a layer's output
    n       number of a layer's outputs, out * out * channels
    v       values that an output sums over that are not zero, averaged over the filters: the form
            k*k*c_in * nonzero / numel, which is nonzero / c_out
    b       bits of a stored value

Two extensions are ours. A layer that the forms take to be ternary but that is not (of a full-precision or a
pruned network) counts as EfficientNet's other layers do, so that one ruler gives the size before and after:
`nonzero` values of b bits, a 1-bit mask if some weight is zero, and v multiplications an output. And
ResNet-20, which the 2019 programs did not score, is read as a MicroNet without shortcut convolutions and
without a BatchNorm before its convolutions; see `residual`.
"""

from torch import nn

from model import row_of
from rulers.published import efficientnet, residual
from rulers.tally import Tally, Widths

FORMS = {"micronet": residual.micronet, "resnet": residual.resnet, "efficientnet": efficientnet.efficientnet}
"""The closed form of each family of networks that has one."""


def count(network: nn.Module, model: str, image_size: int, widths: Widths) -> Tally:
    """Count `network`, built as `model`, for images of `image_size` x `image_size` pixels.

    Every parameter of the network, BatchNorms included, belongs to exactly one line of the tally, in `numel`
    and `nonzero`. `params`, the published "Total number of network params", is smaller: see
    `terms.Layer.merged_params`.
    """
    groups, params = FORMS[row_of(model).family](network, image_size, widths.value)
    return Tally("published", widths, groups, params, truncate=True)
