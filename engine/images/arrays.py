"""Small images as arrays in one `.npz` file a split: read as a data set, and kept as a cache of class folders.

images   uint8 [N, H, W, 3]
labels   integers [N], indices into `classes`
classes  names [C]
"""

import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.images.folders import composed
from engine.program.errors import UserError
from engine.store.files import write_whole


class ImageArrays(NamedTuple):
    """The content of a file, labels as int64."""

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]


def find_arrays(path: Path, with_train: bool) -> tuple[Path, Path] | None:
    """`train.npz` and `val.npz` or `test.npz` in `path`, or None; without the first, the second stands for both."""
    train, val = path / "train.npz", next((p for p in (path / "val.npz", path / "test.npz") if p.is_file()), None)
    if val is None or (with_train and not train.is_file()):
        return None
    return (train if with_train else val), val


def read_arrays(file: Path) -> ImageArrays:
    """Read an `.npz` file of images, executing nothing in it; UserError where it is damaged or something else."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels, classes = arrays["images"], arrays["labels"], _names(arrays["classes"])
    except Exception as error:  # whatever the damaged bytes lead to
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file}: holds no arrays of images, labels and classes ({reason}); make it again") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise UserError(f"{file}: holds images as {images.dtype} {list(images.shape)}, not as uint8 [N, H, W, 3]")
    fitting = labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
    if not fitting or not 0 <= labels.min() <= labels.max() < len(classes):
        raise UserError(f"{file}: its labels do not name one of its classes for each of its {len(images)} images")
    return ImageArrays(images, labels.astype(np.int64), classes)


def _names(classes: np.ndarray) -> list[str]:
    """Class names `[C]` as text, also where they are stored as bytes or numbers."""
    if classes.ndim != 1:
        raise ValueError(f"classes is of the shape {list(classes.shape)}")
    names = (
        name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name) for name in classes.tolist()
    )
    return [composed(name) for name in names]


def cached(
    cache: Path, classes: list[str], decode: Callable[[], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, size, size, 3]` and labels `[N]`: from the `.npz` file `cache`, else from `decode`, and then kept.

    The caller sees to it that `cache` has another name once they change; of those that differ after the last hyphen
    only, the others are removed.
    """
    if cache.is_file():
        with suppress(UserError):
            return read_arrays(cache)[:2]
    images, labels = decode()
    with suppress(UserError, OSError):  # a folder that can't be written to works as well, only slower
        for other in cache.parent.glob(f"{cache.name.rpartition('-')[0]}-*.npz"):
            if other != cache:
                other.unlink()
        buffer = io.BytesIO()
        np.savez(buffer, images=images, labels=labels, classes=np.array(classes))
        write_whole(buffer.getbuffer(), cache)
    return images, labels


def as_tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """uint8 images `[N, H, W, 3]` as `[N, 3, H, W]`, and their labels."""
    return torch.from_numpy(images).movedim(3, 1).contiguous(), torch.from_numpy(labels)


def resized(images: Tensor, size: int) -> Tensor:
    """Images `[N, C, H, W]` of 0 to 255 as uint8 `[N, C, size, size]`, bicubic."""
    if images.dtype == torch.uint8 and images.shape[-2:] == (size, size):
        return images
    images = F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False)
    return images.round().clamp(0, 255).to(torch.uint8)
