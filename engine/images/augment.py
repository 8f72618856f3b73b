"""Augmentation of small images, a whole batch at a time.

The transforms are those of ``torchvision.transforms`` (flip, padded crop, ColorJitter) and Cutout, written as
a few tensor operations over a batch ``[N, 3, H, W]``. Every image gets its own independent draw, so a batch
is distributed as if the per-image transform had been applied to each of its images, but costs far less.

Each random transform draws its parameters and hands them to a deterministic function (``flip_at``,
``crop_at``, ``adjust``, ``cutout_at``) that can be checked exactly. Nothing depends on tensor values on the
host side: there is no data-dependent shape and no read-back, so on CUDA nothing waits for the device. Random
numbers are drawn on the generator's device and follow the images from there: a CPU generator gives the same
augmentation everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from model.registry import CIFAR, Statistics

GRAY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in luma, as torchvision rounds those of ITU-R BT.601."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Columns of the jitter factors, and the names of the four operations in a jitter order."""


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2. ``[N, C, H, W]`` of any dtype in and out."""
    return flip_at(images, _integers(2, images, generator) == 1)


def flip_at(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror left to right the images ``[N, C, H, W]`` where the boolean ``flip`` ``[N]`` is true."""
    return torch.where(_per_image(flip), images.flip(-1), images)


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Pad by ``padding`` zero pixels on all sides and cut a window of the original size at a uniform offset.

    As ``torchvision.transforms.RandomCrop((H, W), padding)``. Images ``[N, C, H, W]`` of any dtype in and
    out: give raw images, so that the padding is black and not the mean colour.
    """
    top = _integers(2 * padding + 1, images, generator)
    left = _integers(2 * padding + 1, images, generator)
    height, width = images.shape[-2:]
    return crop_at(F.pad(images, [padding] * 4), top, left, (height, width))


def crop_at(padded: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut from each image of ``padded`` ``[N, C, H, W]`` a window of ``size`` (height, width) pixels.

    ``top`` and ``left`` are the integer offsets ``[N]`` of the windows' upper left corners.
    """
    windows = padded.unfold(2, size[0], 1).unfold(3, size[1], 1)  # a view [N, C, tops, lefts, height, width]
    image = torch.arange(len(padded), device=padded.device)
    return windows[image, :, top, left]


def color_jitter(
    images: Tensor, brightness: float, contrast: float, saturation: float, hue: float, generator: Generator
) -> Tensor:
    """Jitter brightness, contrast, saturation and hue, in an order drawn for each image.

    Images ``[N, 3, H, W]``, uint8 or float in [0, 1], in; float32 in [0, 1] out. The draws are those of
    ``torchvision.transforms.ColorJitter(brightness, contrast, saturation, hue)`` on float images (on uint8
    images, torchvision also rounds to 8 bits after every operation).
    """
    factors, order = draw_jitter(images, brightness, contrast, saturation, hue, generator)
    return adjust(unit_range(images), factors, order)


def draw_jitter(
    images: Tensor, brightness: float, contrast: float, saturation: float, hue: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Draw the parameters of ``color_jitter``: ``factors`` (float) and ``order`` (integer), each ``[N, 4]``.

    The columns of ``factors`` are brightness, contrast and saturation, each uniform in
    [max(0, 1 - amount), 1 + amount], and hue, uniform in [-hue, hue] (in turns of the colour wheel). A row of
    ``order`` is a uniform permutation of the four columns: the operations of that image, first to last.
    """
    amounts = (brightness, contrast, saturation)
    low = _row([max(0.0, 1 - amount) for amount in amounts] + [-hue], images)
    high = _row([1 + amount for amount in amounts] + [hue], images)
    factors = low + (high - low) * _uniform(4, images, generator)
    order = _uniform(4, images, generator).argsort(dim=1)
    return factors, order


def adjust(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Apply the four colour operations, with each image's ``factors`` ``[N, 4]``, in each image's ``order``.

    Images ``[N, 3, H, W]``, float32 in [0, 1], in and out; ``factors`` and ``order`` ``[N, 4]`` as in
    ``draw_jitter``. Equal to torchvision's ``adjust_brightness``, ``adjust_contrast``, ``adjust_saturation``
    and ``adjust_hue`` called one after the other.

    An image's order splits into the operations before its hue shift and those after it. Shifting the hue is
    the expensive operation, and it is done once, for all images together. The other three are cheap, so each
    of their slots is run on both sides of the hue shift, with factor 1 (the identity) for the images whose
    operation in that slot does not belong to that side. This keeps the images' orders independent and every
    shape fixed, whereas grouping the images by order would need either data-dependent shapes or groups of
    fixed sizes, whose draws are not independent.
    """
    hue_slot = (order == HUE).int().argmax(dim=1)
    ordered_factors = factors.gather(1, order)

    def blend_slot(images: Tensor, slot: int, active: Tensor) -> Tensor:
        factor = torch.where(active, ordered_factors[:, slot], 1.0)
        return _blend(images, order[:, slot], factor)

    for slot in (0, 1, 2):
        images = blend_slot(images, slot, slot < hue_slot)
    images = shift_hue(images, factors[:, HUE])
    for slot in (1, 2, 3):
        images = blend_slot(images, slot, slot > hue_slot)
    return images


def _blend(images: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Scale each image's distance by ``factor`` ``[N]`` from the anchor of its ``operation`` ``[N]``.

    The anchor is black for brightness, the image's mean gray for contrast, its gray image for saturation.
    """
    gray = _gray(images)
    mean = gray.mean(dim=(-2, -1), keepdim=True)
    flat = torch.where(_per_image(operation == CONTRAST), mean, 0.0)
    anchor = torch.where(_per_image(operation == SATURATION), gray, flat)
    return torch.lerp(anchor, images, _per_image(factor)).clamp_(0, 1)


def _gray(images: Tensor) -> Tensor:
    """Luma ``[N, 1, H, W]`` of images ``[N, 3, H, W]``."""
    red, green, blue = images.split(1, dim=1)
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of each image by ``shift`` ``[N]`` turns, keeping HSV saturation and value.

    Images ``[N, 3, H, W]``, float32 in [0, 1], in and out. A channel is at the pixel's maximum while the hue
    is within 1/6 turn of the channel's own hue (red 0, green 1/3, blue 2/3), at its minimum beyond 1/3 turn,
    and linear in between, which is HSV to RGB without its table of six sectors.
    """
    red, green, blue = images.unbind(dim=1)
    low, high = images.amin(dim=1), images.amax(dim=1)
    chroma = high - low
    scale = 1 / chroma.clamp_min(1e-12)  # the hue of a gray pixel is arbitrary, but must be finite
    near_red = (green - blue) * scale
    near_green = (blue - red) * scale + 2
    near_blue = (red - green) * scale + 4
    sixths = torch.where(high == red, near_red, torch.where(high == green, near_green, near_blue))
    hue = (sixths / 6)[:, None] + _per_image(shift)
    turn = hue - torch.arange(3, device=images.device).view(1, 3, 1, 1) / 3
    distance = turn.sub_(turn.round()).abs_()
    level = distance.mul_(-6).add_(2).clamp_(0, 1)
    return level.mul_(chroma[:, None]).add_(low[:, None])


def cutout(images: Tensor, size: int, generator: Generator) -> Tensor:
    """Zero one square of ``size`` x ``size`` pixels in each image, clipped at the image's border.

    The centre of the square is uniform over the image. Images ``[N, C, H, W]`` in and out, normalised, so
    that zero is the mean colour. Source: DeVries & Taylor 2017, "Improved Regularization of Convolutional
    Neural Networks with Cutout", arXiv:1708.04552.
    """
    y = _integers(images.shape[-2], images, generator)
    x = _integers(images.shape[-1], images, generator)
    return cutout_at(images, y, x, size)


def cutout_at(images: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """Zero rows y - size // 2 up to y - size // 2 + size (exclusive) and the same columns around x.

    Images ``[N, C, H, W]``; the centres ``y`` and ``x`` are integers ``[N]``.
    """

    def covered(centre: Tensor, length: int) -> Tensor:
        offset = torch.arange(length, device=images.device) - (centre[:, None] - size // 2)
        return (offset >= 0) & (offset < size)

    rows, columns = covered(y, images.shape[-2]), covered(x, images.shape[-1])
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)


class Mixed(NamedTuple):
    """Images ``[N, C, H, W]`` to train on, and what they show: ``labels``, and ``share`` (0-dim) of each ``others``.

    Without ``others`` nothing is mixed.
    """

    images: Tensor
    labels: Tensor
    others: Tensor | None = None
    share: Tensor | None = None


def cutmix(images: Tensor, labels: Tensor, probability: float) -> Mixed:
    """With ``probability``, replace in all images of a batch one and the same box by that of the image before.

    The box has the image's proportions, an area uniform in [0, 1] of the image's and its centre anywhere in the image,
    beyond whose borders it is cut off. Draws come from the default generator of the images' device, so that a CUDA
    graph draws anew whenever it is replayed; torchvision's CutMix draws on the host, and a graph would repeat its box.
    Labels ``[N]`` are class numbers. Source: Yun et al. 2019, "CutMix", arXiv:1905.04899, with alpha = 1.
    """
    if not probability:
        return Mixed(images, labels)
    whether, area, y, x = torch.rand(4, device=images.device).unbind()
    return cutmix_at(images, labels, torch.where(whether < probability, area, 0.0), y, x)


def cutmix_at(images: Tensor, labels: Tensor, area: Tensor, y: Tensor, x: Tensor) -> Mixed:
    """CutMix with a box of ``area`` around ``y`` and ``x``, 0-dim, all as shares of the image's."""

    def covered(centre: Tensor, length: int) -> Tensor:
        pixel = (torch.arange(length, device=images.device) + 0.5) / length
        return (pixel - centre).abs() < area.sqrt() / 2

    box = covered(y, images.shape[-2])[:, None] & covered(x, images.shape[-1])
    return Mixed(torch.where(box, images.roll(1, 0), images), labels, labels.roll(1), box.float().mean())


def unit_range(images: Tensor) -> Tensor:
    """Float32 images in [0, 1]: uint8 images divided by 255, contiguous, or float images, which are taken to be so."""
    if images.dtype == torch.uint8:
        return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, not {images.dtype}")
    return images.to(torch.float32)


def normalise(images: Tensor, statistics: Statistics = CIFAR) -> Tensor:
    """Subtract the mean and divide by the standard deviation, per channel and on the scale [0, 1].

    Images ``[N, 3, H, W]``, uint8 or float in [0, 1], in; float32 out. On its own, the evaluation path.
    """
    mean, std = (_row(values, images).view(1, -1, 1, 1) for values in statistics)
    values = unit_range(images)  # float32 images themselves, which are the caller's
    return (values - mean if values is images else values.sub_(mean)).div_(std)


@dataclass(frozen=True)
class Augmentation:
    """Training-time augmentation: flip, crop, ColorJitter, normalisation and Cutout, in that order.

    Args:
        flip: mirror half of the images.
        padding: pixels of zero padding before the random crop; 0 for no crop.
        jitter: the brightness, contrast, saturation and hue of ``color_jitter``; None for no jitter.
        cutout: side of the Cutout square in pixels; 0 for no Cutout.
        statistics: what images are normalised by.
    """

    flip: bool = False
    padding: int = 0
    jitter: tuple[float, float, float, float] | None = None
    cutout: int = 0
    statistics: Statistics = CIFAR

    def __post_init__(self) -> None:
        if self.padding < 0 or self.cutout < 0:
            raise ValueError(f"padding and cutout must not be negative: {self}")
        jitter = self.jitter
        if jitter is not None and (len(jitter) != 4 or min(jitter) < 0 or jitter[HUE] > 0.5):
            raise ValueError(f"jitter must be four non-negative amounts, the hue at most 0.5: {self}")

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Augment raw images ``[N, 3, H, W]`` (uint8) into normalised ones (float32)."""
        if self.flip:
            images = random_flip(images, generator)
        if self.padding:
            images = random_crop(images, self.padding, generator)
        if self.jitter is not None:
            images = color_jitter(images, *self.jitter, generator)
        images = normalise(images, self.statistics)
        if self.cutout:
            images = cutout(images, self.cutout, generator)
        return images


def _integers(bound: int, images: Tensor, generator: Generator) -> Tensor:
    """One uniform integer in [0, bound) per image, ``[N]``."""
    draws = torch.randint(bound, (len(images),), generator=generator, device=generator.device)
    return draws.to(images.device, non_blocking=True)


def _uniform(columns: int, images: Tensor, generator: Generator) -> Tensor:
    """``columns`` uniform numbers in [0, 1) per image, ``[N, columns]``."""
    draws = torch.rand(len(images), columns, generator=generator, device=generator.device)
    return draws.to(images.device, non_blocking=True)


def _row(values: Sequence[float], images: Tensor) -> Tensor:
    """Constants as a float32 tensor on the device of the images."""
    return torch.tensor(values, dtype=torch.float32).to(images.device, non_blocking=True)


def _per_image(values: Tensor) -> Tensor:
    """Reshape ``[N]`` to ``[N, 1, 1, 1]``, to broadcast over images."""
    return values.view(-1, 1, 1, 1)
