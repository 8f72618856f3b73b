"""Image files decoded: whatever they hold, upright and as RGB of 8 bit.

Transparent images get a white ground. Values of more than 8 bit are scaled by what all images of a data set hold: see
`White`. What can't be decoded is a `Fault`.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from engine.program.errors import UserError, printable

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of odd metadata in images that decode

LISTED = 10  # files that an error names
GONE = ("is gone", "restore it, or begin a run without it")
BITS = (8, 10, 12, 14, 16)  # that cameras and scanners give
TOPS = (1.0, *(2.0**bits - 1 for bits in BITS))  # what floating-point images may have as white
TURNS = {  # what makes an image upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PHOTOMETRIC = 262  # the tag in TIFF files that is 0 where 0 means white
DEEP_COLOUR = re.compile(r"(RGB|LA|CMYK)\w*;16[BLN]", re.IGNORECASE)  # Pillow's names of 16-bit samples it cuts to 8


class Box(NamedTuple):
    """A part of an image, in pixels from its upper left corner, as it lies in the file."""

    left: int
    top: int
    right: int
    bottom: int


Part = Callable[[Image.Image], tuple[Box, int]]
"""Chooses a part of an image, of which only the size is known by then, and how many pixels wide and high it must be."""


class Fault(NamedTuple):
    """What is wrong with an image file, and what to do."""

    path: str
    what: str
    advice: str = "mend or remove it"


class BadImages(UserError):
    """Images can't be used: `faults` is not empty. The message names the first ten, and says how many there are."""

    def __init__(self, faults: Sequence[Fault]):
        super().__init__(faults)  # what is pickled, where a worker process meets one
        self.faults = list(faults)

    def __str__(self) -> str:
        first, count = self.faults[0], len(self.faults)
        if count == 1:
            return f"{printable(first.path)}: {first.what}; {first.advice}"
        root = os.path.commonpath([os.path.dirname(fault.path) for fault in self.faults])
        names = [printable(os.path.relpath(fault.path, root)) for fault in self.faults[:LISTED]]
        more = f" and {count - LISTED:,} more" if count > LISTED else ""
        return (
            f"{printable(root)}: {count:,} images can't be used: {', '.join(names)}{more} (the first {first.what}); "
            f"mend or remove them"
        )


@dataclass(frozen=True)
class White:
    """What stands for white in images of more than 8 bit: `2**bits - 1` in whole numbers, `top` in floating point."""

    bits: int = 16
    top: float = 1.0


class Range(NamedTuple):
    """The least and the largest value of an image of more than 8 bit.

    `kind` is "whole", "floating", or "colour": of 16 bit, of which Pillow gives the upper 8.
    """

    kind: str
    low: float
    high: float


def open_image(path: str, white: White | None = None, part: Part | None = None) -> Image.Image:
    """Decode an image file as upright RGB of 8 bit; BadImages with its path where that fails.

    With `part`, only the part that it chooses. A JPEG is then decoded at a half, a quarter or an eighth of its size
    where that leaves pixels enough.
    """
    with _blaming(path), Image.open(path) as image:
        box = _load(image, part)
        turn = _turn(image)
        rgb = _as_rgb(image, white or White())
        rgb = rgb.crop(box) if box else rgb
        return rgb if turn is None else rgb.transpose(turn)


def _load(image: Image.Image, part: Part | None) -> Box | None:
    """Decode as many pixels as `part` needs, and tell its box among them; None is the whole image."""
    if part is None:
        image.load()
        return None
    width, height = image.size
    box, least = part(image)
    enough = width * least // (box.right - box.left), height * least // (box.bottom - box.top)
    image.draft(None, enough)  # JPEG alone: a half, a quarter or an eighth of its size, not less than this
    image.load()
    x, y = image.width / width, image.height / height
    return Box(round(box.left * x), round(box.top * y), round(box.right * x), round(box.bottom * y))


def decode_all(
    files: list[tuple[str, int]], size: int, threads: int, white: White | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Image files as uint8 `[N, size, size, 3]`, and their labels."""

    def decode(file: tuple[str, int]) -> np.ndarray:
        image = open_image(file[0], white)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image)

    with ThreadPoolExecutor(threads) as pool:
        images = np.stack(list(pool.map(decode, files)))
    return images, np.array([label for _, label in files])


def deep_range(path: str) -> Range | None:
    """Decode an image file for its range of values, None where they are of 8 bit; BadImages where that fails."""
    with _blaming(path), Image.open(path) as image:
        deep_colour = DEEP_COLOUR.search(str(image.tile))
        image.draft(None, (1, 1))  # JPEG: all is decoded, but fewer pixels are made of it
        image.load()
        values, kind = _deep_values(image), "colour"
        if values is None:
            values = np.asarray(_as_rgb(image, White()))
            if not deep_colour:
                return None
        else:
            kind = "floating" if values.dtype.kind == "f" else "whole"
        low, high = float(values.min()), float(values.max())  # NaN, where any value is that
    if not 0 <= low <= high <= TOPS[-1]:
        what = f"holds values from {low:g} to {high:g}, not from 0 to at most {TOPS[-1]:g}"
        raise BadImages([Fault(path, what, "scale and save it anew, or remove it")])
    return Range(kind, low, high)


def side(path: str) -> int:
    """The larger side in pixels, as the file's head says it; 0 where that can't be read."""
    try:
        with Image.open(path) as image:
            return max(image.size)
    except MemoryError:
        raise
    except Exception:  # decoders raise whatever the damaged bytes lead to
        return 0


@contextmanager
def _blaming(path: str) -> Iterator[None]:
    try:
        yield
    except (BadImages, MemoryError):
        raise
    except FileNotFoundError:
        raise BadImages([Fault(path, *GONE)]) from None
    except UnidentifiedImageError:
        raise BadImages([Fault(path, "does not decode as an image (of no known format)")]) from None
    except Exception as error:  # decoders raise whatever the damaged bytes lead to
        reason = printable(" ".join(str(error).split()) or type(error).__name__)[:100]
        raise BadImages([Fault(path, f"does not decode as an image ({reason})")]) from None


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block says nothing
        return None


def _deep_values(image: Image.Image) -> np.ndarray | None:
    """Grey values `[H, W]` of more than 8 bit, whole or floating-point; None where an image has no such values."""
    return np.asarray(image) if image.mode.startswith(("I", "F")) else None


def _as_rgb(image: Image.Image, white: White) -> Image.Image:
    values = _deep_values(image)
    if values is not None:
        floating = values.dtype.kind == "f"
        scaled = (values * (255 / white.top)).round() if floating else values.astype(np.int64) >> (white.bits - 8)
        grey = scaled.clip(0, 255).astype(np.uint8)
        negative = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0  # Pillow sees to it in images of 8 bit only
        image = Image.fromarray(255 - grey if negative else grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
