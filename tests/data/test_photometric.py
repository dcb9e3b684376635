"""Photometric changes against torchvision's and matplotlib's, and how they are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from torch import Tensor

from giantdet.data.photometric import (
    BRIGHTNESS,
    FACTORS,
    HUE,
    Distortion,
    Image,
    change_brightness,
    change_contrast,
    change_saturation,
    distort,
    draw_distortion,
    rotate_hue,
)

NEUTRAL = Distortion(0.0, 1.0, 1.0, 0.0, contrast_first=True)


@pytest.fixture
def image() -> Image:
    """Noise and all colours whose channels are 0, 127, 128 or 255; more rows than are processed at a time."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (75, 64, 3), dtype=np.uint8)
    levels = np.array([0, 127, 128, 255], np.uint8)
    image[0] = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 3)
    image[1] = np.arange(64, dtype=np.uint8)[:, None]  # greys
    return image


def to_torch(image: Image) -> Tensor:
    """float32 `[3, h, w]` in [0, 1], where torchvision does not truncate fractions."""
    return TF.to_dtype(torch.from_numpy(image).permute(2, 0, 1), torch.float32, scale=True)


def same_up_to_rounding(found: Image, expected: Tensor) -> None:
    assert found.dtype == np.uint8 and found.shape == (75, 64, 3)
    difference = torch.from_numpy(found).permute(2, 0, 1) - 255 * expected.clamp(0, 1)
    assert difference.abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("levels", [-32.0, -0.7, 5.3, 32.0])
def test_brightness(image: Image, levels: float) -> None:
    mean = [-levels / 255] * 3
    same_up_to_rounding(
        change_brightness(image, levels), TF.normalize(to_torch(image), mean, [1.0, 1.0, 1.0])
    )


@pytest.mark.parametrize("factor", [0.5, 0.93, 1.5])
def test_contrast(image: Image, factor: float) -> None:
    """torchvision's brightness also multiplies all values by a factor."""
    same_up_to_rounding(change_contrast(image, factor), TF.adjust_brightness(to_torch(image), factor))


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.93, 1.07, 1.5])
def test_saturation(image: Image, factor: float) -> None:
    """Compare with matplotlib's HSV: torchvision blends the image with its greys, which changes the value."""
    hsv = rgb_to_hsv(image / 255)
    hsv[..., 1] = np.minimum(hsv[..., 1] * factor, 1)
    same_up_to_rounding(change_saturation(image, factor), torch.from_numpy(hsv_to_rgb(hsv)).permute(2, 0, 1))


@pytest.mark.parametrize("degrees", [-150.0, -36.0, 0.4, 20.0, 36.0, 120.0])
def test_hue(image: Image, degrees: float) -> None:
    same_up_to_rounding(rotate_hue(image, degrees), TF.adjust_hue(to_torch(image), degrees / 360))


def test_identity_changes_return_a_copy(image: Image) -> None:
    before = image.copy()
    found = distort(image, NEUTRAL)
    assert np.array_equal(found, image) and not np.shares_memory(found, image)
    distort(image, Distortion(20.0, 1.3, 0.7, 30.0, contrast_first=False))
    assert np.array_equal(image, before)


def test_order(image: Image) -> None:
    """Values clipped by brightness and contrast reveal the order of the changes."""
    bright = change_brightness(image, 25.0)
    first = rotate_hue(change_saturation(change_contrast(bright, 1.4), 0.6), -30.0)
    last = change_contrast(rotate_hue(change_saturation(bright, 0.6), -30.0), 1.4)
    assert not np.array_equal(first, last)
    for contrast_first, expected in ((True, first), (False, last)):
        assert np.array_equal(distort(image, Distortion(25.0, 1.4, 0.6, -30.0, contrast_first)), expected)


def test_probabilities_and_ranges() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([draw_distortion(rng) for _ in range(4000)])
    changed = np.column_stack([drawn[:, :4] != NEUTRAL[:4], drawn[:, 4] == 1])
    # Each change alone and each pair together, as independent events; 4 standard deviations.
    assert np.abs(changed.mean(0) - 0.5).max() < 4 * 0.5 / np.sqrt(4000)
    pairs = changed.T.astype(float) @ changed / 4000
    assert np.abs(pairs[~np.eye(5, dtype=bool)] - 0.25).max() < 4 * np.sqrt(3) / 4 / np.sqrt(4000)
    for column, (low, high) in enumerate(((-BRIGHTNESS, BRIGHTNESS), FACTORS, FACTORS, (-HUE, HUE))):
        values = np.sort(drawn[changed[:, column], column])
        assert low <= values[0] and values[-1] <= high
        # Uniform: the empirical distribution is close to a straight line everywhere (Kolmogorov and Smirnov).
        rank = np.arange(len(values)) / len(values)
        assert np.abs((values - low) / (high - low) - rank).max() < 2 / np.sqrt(len(values))
    assert (BRIGHTNESS, FACTORS, HUE) == (32.0, (0.5, 1.5), 2 * 18.0)


def test_the_same_seed_draws_the_same() -> None:
    """Every draw advances the stream equally, so that later draws do not depend on earlier ones."""
    for seed in range(20):
        rng, counted = np.random.default_rng(seed), np.random.default_rng(seed)
        assert draw_distortion(rng) == draw_distortion(np.random.default_rng(seed))
        counted.random(9)
        assert rng.random() == counted.random()
