"""Images that tests make, read and compare."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.images.batches import Data, ImageRequest, load_data
from helpers import refusals

CPU = torch.device("cpu")
CHANNELS = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}
PHOTO = (90, 70)  # width and height in pixels: above those of small images
CLASSES = tuple("abcdefghijk")  # of one image each: the label tells the image


def random_image(size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise of `size` (width, height) pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *CHANNELS[mode]), dtype=np.uint8)
    return Image.fromarray(values, mode)


def write_grey(path: Path, rows: list[list[float]], dtype: str) -> None:
    """Write one channel of values of any type."""
    Image.fromarray(np.array(rows, dtype=dtype)).save(path)


def load(path: Path, name: str = "folder", **options) -> Data:
    return load_data(ImageRequest(name, path, **{"batch_size": 2, "val_batch_size": 3, "workers": 0, **options}), CPU)


def refusal(path: Path, name: str = "folder", **options) -> str:
    """The message that reading `path` is answered with, checked to be one line."""
    return refusals.refusal(load, path, name, **options)


def pixels(path: Path) -> torch.Tensor:
    """The image `[3, H, W]` as Pillow converts it, on white ground."""
    image = Image.open(path)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255)), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).movedim(2, 0)


def drawn(data: Data, seed: int) -> list[torch.Tensor]:
    """Images and labels of an epoch, one behind the other."""
    return [tensor for batch in data.train_batches(seed) for tensor in batch]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
