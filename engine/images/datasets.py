"""The known data sets: one row of facts each. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

DATA_PATH = "../data"  # where images are unless the user says
MAX_IMAGE_SIZE = 2**16  # pixels
SMALL = 64  # px; where a data set may be either, larger images are treated as photographs
PHOTOGRAPH_SIZE = 224  # px


@dataclass(frozen=True)
class Dataset:
    """What is particular to a data set.

    Attributes:
        source: what the name stands for where `--data-path` holds neither class folders nor arrays: "torchvision"
            downloads it, a "folder" must be there; "scikit-learn" brings it along, `--data-path` does not apply.
        photographs: whether its images stay on disk and are cropped as ImageNet's: "always", "never", or "by size".
        native_size: side in pixels unless the user says another; None takes that of the images.
        flip: whether a mirrored image is one of the same class.
        padding: of the random crop, as a share of an image's side.
        jitter: of brightness, contrast, saturation and hue; None for no jitter.
        cutout: side of the Cutout square, as a share of an image's side; 0 for no Cutout.
        followup: the data set as which the authors' follow-up augments this one, where that is another one's.
        learning_rate_steps: epochs at which training from scratch divides the learning rate by 10; where there are
            none, it falls along half a cosine.
    """

    source: Literal["torchvision", "folder", "scikit-learn"] = "torchvision"
    photographs: Literal["always", "never", "by size"] = "never"
    native_size: int | None = 32
    flip: bool = True
    padding: float = 1 / 8
    jitter: tuple[float, float, float, float] | None = None
    cutout: float = 0.0
    followup: str | None = None
    learning_rate_steps: tuple[int, ...] = ()


DATASETS = {
    "CIFAR100": Dataset(jitter=(0.3, 0.3, 0.3, 0.075), cutout=1 / 2),
    "CIFAR10": Dataset(followup="CIFAR100"),
    "MNIST": Dataset(flip=False),
    "FashionMNIST": Dataset(),
    "ImageNet": Dataset("folder", "always", PHOTOGRAPH_SIZE, learning_rate_steps=(30, 60, 90)),
    "digits": Dataset("scikit-learn", flip=False),
    "folder": Dataset("folder", "by size", native_size=None),
}
AUGMENTATIONS = ("published", "followup", "CIFAR10", "CIFAR100")
