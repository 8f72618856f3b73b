"""Batched augmentation against torchvision's per-image transforms: exact for fixed draws, then the draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torchvision import transforms
from torchvision.transforms.v2 import functional as TF

from engine.images import augment
from engine.images.augment import CIFAR, HUE, Augmentation, Statistics

JITTER = (0.3, 0.3, 0.3, 0.075)
POLICY = Augmentation(flip=True, padding=4, jitter=JITTER, cutout=8)
SEEDS = st.integers(0, 2**32 - 1)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def raw_images(number: int, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (number, 3, height, width), dtype=torch.uint8, generator=seeded(seed))


def copies(image: Tensor, number: int) -> Tensor:
    return image.expand(number, *image.shape)


def standardised_chi_square(counts: Tensor, expected: Tensor) -> float:
    """Pearson's statistic, less its mean and divided by its standard deviation under the expected counts."""
    assert counts.shape == expected.shape and counts.sum().item() == pytest.approx(expected.sum().item())
    freedom = counts.numel() - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / (2 * freedom) ** 0.5


def assert_uniform(values: Tensor, bins: int) -> None:
    """Integers in [0, bins) are equally frequent."""
    counts = torch.bincount(values, minlength=bins).double()
    assert standardised_chi_square(counts, torch.full((bins,), len(values) / bins).double()) < 5


def torchvision_adjust(image: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for operation in order.tolist():
        image = operations[operation](image, factors[operation].item())
    return image


# Fixed draws.


def test_flip_at_mirrors_the_chosen_images() -> None:
    images = raw_images(3, 5, 7)
    flipped = augment.flip_at(images, torch.tensor([True, False, True]))
    assert torch.equal(flipped[0], TF.horizontal_flip(images[0]))
    assert torch.equal(flipped[1], images[1])
    assert torch.equal(flipped[2], TF.horizontal_flip(images[2]))


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), padding=st.integers(0, 4), seed=SEEDS)
def test_crop_at_cuts_torchvisions_windows(height: int, width: int, padding: int, seed: int) -> None:
    number = 5
    images = raw_images(number, height, width, seed)
    top, left = torch.randint(0, 2 * padding + 1, (2, number), generator=seeded(seed))
    cropped = augment.crop_at(F.pad(images, [padding] * 4), top, left, (height, width))
    assert cropped.shape == images.shape and cropped.dtype == torch.uint8
    for image, result, y, x in zip(images, cropped, top.tolist(), left.tolist(), strict=True):
        assert torch.equal(result, TF.crop(TF.pad(image, [padding]), y, x, height, width))


@pytest.mark.parametrize(
    ("operation", "tolerance"),
    [("brightness", 1e-6), ("contrast", 1e-6), ("saturation", 1e-6), ("hue", 1e-5)],
)
def test_each_colour_operation_equals_torchvisions(operation: str, tolerance: float) -> None:
    column = ("brightness", "contrast", "saturation", "hue").index(operation)
    values = torch.linspace(-0.5, 0.5, 21) if operation == "hue" else torch.linspace(0, 2.5, 21)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(21, 1)
    factors[:, column] = values
    images = augment.unit_range(raw_images(21, 16, 16))
    adjusted = augment.adjust(images, factors, torch.arange(4).expand(21, 4))
    for image, result, value in zip(images, adjusted, values.tolist(), strict=True):
        expected = getattr(TF, f"adjust_{operation}")(image, value)
        torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


def test_hue_shift_of_pure_and_gray_colours_equals_torchvisions() -> None:
    levels = torch.tensor([0.0, 1e-6, 0.5, 1.0])
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 8, 8)
    shifts = torch.linspace(-0.5, 0.5, 25)
    shifted = augment.shift_hue(copies(colours, 25), shifts)
    for result, shift in zip(shifted, shifts.tolist(), strict=True):
        torch.testing.assert_close(result, TF.adjust_hue(colours, shift), rtol=0, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_adjust_follows_each_images_own_order(seed: int) -> None:
    """All 24 orders in one batch, with factors strong enough that clipping tells the orders apart."""
    order = torch.tensor(list(itertools.permutations(range(4))))
    images = augment.unit_range(raw_images(24, 6, 5, seed))
    factors = 2 * torch.rand(24, 4, generator=seeded(seed))
    factors[:, HUE] = factors[:, HUE] / 2 - 0.5
    untouched = images.clone()
    adjusted = augment.adjust(images, factors, order)
    assert torch.equal(images, untouched)
    for image, result, image_factors, image_order in zip(images, adjusted, factors, order, strict=True):
        expected = torchvision_adjust(image, image_factors, image_order)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(level=st.floats(0, 1, width=32), saturation=st.floats(0, 3), hue=st.floats(-0.5, 0.5))
def test_gray_stays_as_it_is_under_saturation_and_hue(level: float, saturation: float, hue: float) -> None:
    images = torch.full((1, 3, 4, 4), level)
    adjusted = augment.adjust(images, torch.tensor([[1.0, 1.0, saturation, hue]]), torch.arange(4)[None])
    assert (adjusted.amax(1) - adjusted.amin(1)).max() < 1e-6
    darkening = 1 - sum(augment.GRAY)  # torchvision's luma weights add up to 0.9999
    torch.testing.assert_close(adjusted, images, rtol=0, atol=2 * darkening + 1e-6)


@pytest.mark.parametrize("size", [1, 3, 8, 30])
def test_cutout_at_zeroes_a_clipped_square(size: int) -> None:
    height, width = 10, 12
    y, x = torch.cartesian_prod(torch.arange(height), torch.arange(width)).T
    images = torch.rand(len(y), 3, height, width, generator=seeded()) + 1
    expected = images.clone()
    for image, row, column in zip(expected, y.tolist(), x.tolist(), strict=True):
        top, left = row - size // 2, column - size // 2
        image[:, max(0, top) : max(0, top + size), max(0, left) : max(0, left + size)] = 0
    assert torch.equal(augment.cutout_at(images, y, x, size), expected)


@given(SEEDS, *[st.floats(0, 1, width=32).map(np.float32)] * 3)
def test_cutmix_pastes_one_box_of_the_image_before(seed: int, area: np.float32, y: np.float32, x: np.float32) -> None:
    images, labels = raw_images(3, 4, 8, seed).float(), torch.tensor([7, 8, 9])
    mixed = augment.cutmix_at(images, labels, *map(torch.tensor, (area, y, x)))
    expected, pasted = images.clone(), 0
    for row, column in itertools.product(range(4), range(8)):
        if max(abs((row + 0.5) / 4 - y), abs((column + 0.5) / 8 - x)) < np.sqrt(area) / 2:
            expected[:, :, row, column] = images[[2, 0, 1], :, row, column]
            pasted += 1
    assert torch.equal(mixed.images, expected)
    assert mixed.labels.tolist() == [7, 8, 9] and mixed.others is not None and mixed.others.tolist() == [9, 7, 8]
    assert mixed.share is not None and mixed.share.item() == pytest.approx(pasted / 32)


def test_normalise_equals_torchvisions() -> None:
    images = raw_images(5)
    expected = TF.normalize(TF.to_dtype(images, torch.float32, scale=True), *map(list, CIFAR))
    torch.testing.assert_close(augment.normalise(images), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(augment.normalise(images.double() / 255), expected, rtol=0, atol=1e-6)
    halves = augment.normalise(images, Statistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    torch.testing.assert_close(halves, images / 127.5 - 1, rtol=0, atol=1e-6)
    with pytest.raises(TypeError, match="uint8 or floating point"):
        augment.normalise(images.int())


# Random draws.


def test_half_of_the_images_are_flipped() -> None:
    number = 4000
    image = raw_images(1, 1, 2)[0]
    flips = (augment.random_flip(copies(image, number), seeded()) != image).flatten(1).any(1)
    assert abs(flips.sum().item() - number / 2) < 5 * (number / 4) ** 0.5


def test_crop_offsets_are_uniform_as_torchvisions() -> None:
    """With as many pixels as offsets, the centre pixel of the crop is the original pixel at (top, left)."""
    padding, size = 2, 5
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = (size * row + column).expand(3, size, size).to(torch.uint8)

    crops = augment.random_crop(copies(image, 5000), padding, seeded())
    assert_uniform(crops[:, 0, padding, padding].long(), size**2)

    torchvision_crop = transforms.RandomCrop(size, padding=padding)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        references = torch.stack([torchvision_crop(image) for _ in range(2500)])
    assert_uniform(references[:, 0, padding, padding].long(), size**2)
    assert set(map(bytes, crops.numpy())) == set(map(bytes, references.numpy()))


def test_jitter_factors_are_uniform_in_torchvisions_ranges() -> None:
    number, bins = 10000, 20
    amounts = (0.3, 0.6, 1.5, 0.075)
    factors, _ = augment.draw_jitter(raw_images(number, 1, 1), *amounts, seeded())
    reference = transforms.ColorJitter(*amounts)
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        low, high = getattr(reference, name)
        position = (factors[:, column].double() - low) / (high - low)
        assert position.min() > -1e-6 and position.max() < 1 + 1e-6
        assert_uniform((position * bins).long().clamp(0, bins - 1), bins)


def test_jitter_orders_are_uniform_and_independent_between_neighbours() -> None:
    number = 20000
    _, order = augment.draw_jitter(raw_images(number, 1, 1), *JITTER, seeded())
    assert torch.equal(order.sort(dim=1).values, torch.arange(4).expand(number, 4))
    code = (order * torch.tensor([64, 16, 4, 1])).sum(1)
    assert_uniform(torch.unique(code, return_inverse=True)[1], 24)
    hue_slot = order.argsort(dim=1)[:, HUE]
    assert_uniform(4 * hue_slot[0::2] + hue_slot[1::2], 16)


def test_jitter_moments_match_torchvisions() -> None:
    """Mean and variance of every pixel of one image, dark, bright and saturated colours among them."""
    amounts = (0.4, 0.4, 0.4, 0.1)
    colours = [[10, 20, 60], [250, 240, 200], [220, 30, 40], [40, 200, 90], [128, 120, 100], [255, 255, 0]]
    image = torch.tensor(colours, dtype=torch.uint8).T.reshape(3, 2, 3)
    batched = augment.color_jitter(copies(image, 20000), *amounts, seeded())

    torchvision_jitter = transforms.ColorJitter(*amounts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        references = torch.stack([torchvision_jitter(image.float() / 255) for _ in range(1500)])

    assert batched.min() >= 0 and batched.max() <= 1
    centre = references.mean(0)
    for power in (1, 2):
        samples = [((result - centre) ** power).double() for result in (batched, references)]
        difference = samples[0].mean(0) - samples[1].mean(0)
        error = sum(sample.var(0) / len(sample) for sample in samples).sqrt()
        assert (difference / error.clamp_min(1e-9)).abs().max() < 5


def test_cutout_areas_are_those_of_uniform_centres() -> None:
    number, length, size = 10000, 12, 5
    sides = [min(length, c - size // 2 + size) - max(0, c - size // 2) for c in range(length)]
    areas = torch.tensor([height * width for height in sides for width in sides])
    assert areas.max() == size**2
    cut = augment.cutout(torch.ones(number, 3, length, length), size, seeded())
    assert torch.equal(cut[:, 0], cut[:, 1]) and torch.equal(cut[:, 0], cut[:, 2])
    counts = torch.bincount((cut[:, 0] == 0).sum(dim=(1, 2)), minlength=size**2 + 1).double()
    expected = torch.bincount(areas).double() * number / length**2
    assert not counts[expected == 0].any()
    assert standardised_chi_square(counts[expected > 0], expected[expected > 0]) < 5


def test_cutmix_takes_the_share_of_batches_that_is_asked_for() -> None:
    """A box of side s, its centre uniform, covers (s - s^2 / 4)^2 on average when it is cut off at the borders."""
    images, labels = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 32, 32), torch.arange(2)
    assert augment.cutmix(images, labels, 0.0) == (images, labels, None, None)
    torch.manual_seed(0)
    shares = torch.stack([augment.cutmix(images, labels, 0.25)[3] for _ in range(4000)])  # type: ignore[arg-type]
    assert (shares > 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    side = torch.linspace(0, 1, 10001).sqrt()
    assert shares.mean().item() == pytest.approx(0.25 * (side - side**2 / 4).square().mean().item(), rel=0.1)


@pytest.mark.parametrize(
    ("transform", "least_distinct"),
    [
        (augment.random_flip, 2),
        (lambda images, generator: augment.random_crop(images, 4, generator), 30),
        (lambda images, generator: augment.color_jitter(images, *JITTER, generator), 64),
        (lambda images, generator: augment.cutout(images, 5, generator), 30),
        (POLICY, 64),
    ],
    ids=["flip", "crop", "jitter", "cutout", "policy"],
)
def test_each_image_has_its_own_draw_given_by_the_seed(
    transform: Callable[[Tensor, Generator], Tensor], least_distinct: int
) -> None:
    images = copies(raw_images(1, 12, 12)[0], 64)
    before = images.clone()
    results = transform(images, seeded(1))
    assert torch.equal(images, before)
    assert torch.equal(results, transform(images, seeded(1)))
    assert not torch.equal(results, transform(images, seeded(2)))
    assert len(torch.unique(results.flatten(1), dim=0)) >= least_distinct


# The policy.


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (7, 3, 32, 32), (3, 3, 9, 14)])
def test_policy_gives_normalised_float32_images_of_the_same_shape(shape: tuple[int, ...]) -> None:
    images = raw_images(shape[0], *shape[2:])
    augmented = POLICY(images, seeded())
    assert augmented.shape == shape and augmented.dtype == torch.float32
    low, high = (TF.normalize(torch.full((3, 1, 1), level), *map(list, CIFAR)) for level in (0.0, 1.0))
    assert (augmented >= low - 1e-5).all() and (augmented <= high + 1e-5).all()


def test_policy_without_steps_is_the_evaluation_path() -> None:
    images = raw_images(4)
    generator = seeded()
    state = generator.get_state()
    assert torch.equal(Augmentation()(images, generator), augment.normalise(images))
    assert torch.equal(generator.get_state(), state)


def test_policy_applies_its_steps_in_order() -> None:
    images, generator = raw_images(16, 32, 32), seeded(3)
    expected = augment.random_crop(augment.random_flip(images, generator), 4, generator)
    expected = augment.normalise(augment.color_jitter(expected, *JITTER, generator))
    expected = augment.cutout(expected, 8, generator)
    assert torch.equal(POLICY(images, seeded(3)), expected)


def test_crop_padding_is_black_and_cutout_is_the_mean_colour() -> None:
    white = torch.full((200, 3, 8, 8), 255, dtype=torch.uint8)
    black = augment.normalise(torch.zeros_like(white))
    cropped = Augmentation(padding=4)(white, seeded())
    assert ((cropped == black) | (cropped == augment.normalise(white))).all()
    assert (cropped == black).any()
    assert (Augmentation(cutout=4)(white, seeded()) == 0).any()


@pytest.mark.parametrize(
    "steps",
    [
        {"padding": -1},
        {"cutout": -1},
        {"jitter": (0.1, 0.1, 0.1)},
        {"jitter": (0.1, -0.1, 0.1, 0.1)},
        {"jitter": (0.1, 0.1, 0.1, 0.6)},
    ],
)
def test_impossible_policies_are_refused(steps: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        Augmentation(**steps)


# Devices.


def test_policy_never_looks_at_values() -> None:
    """Tensors on the meta device have no values: a read-back or a data-dependent shape is an error."""
    images = raw_images(6, 32, 32).to("meta")
    augmented = POLICY(images, seeded())
    assert augmented.device.type == "meta" and augmented.shape == images.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_policy_on_cuda_does_not_synchronise_and_equals_the_cpu() -> None:
    images = raw_images(32, 32, 32)
    on_cuda, on_cuda_generator = images.cuda(), Generator("cuda").manual_seed(0)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmented = POLICY(on_cuda, seeded())
        drawn_on_cuda = POLICY(on_cuda, on_cuda_generator)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.testing.assert_close(augmented.cpu(), POLICY(images, seeded()), rtol=0, atol=1e-4)
    assert drawn_on_cuda.shape == images.shape and not torch.equal(drawn_on_cuda, augmented)
