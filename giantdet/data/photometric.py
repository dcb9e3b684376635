"""Random changes of the colours of training images: brightness, contrast, saturation and hue.

The rule is that of SSD (Liu et al. 2016) as in mmsegmentation's `PhotoMetricDistortion`; mmdetection's
rotates hues by half as much, and also permutes channels. Two deviations: results are rounded, where the
reference drops their fractions, and hues are not rounded to OpenCV's steps of 2 degrees.

Images are uint8 RGB `[h, w, 3]`. Each function returns a new one, clipped to [0, 255].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Channel = NDArray[np.float32]

PROBABILITY = 0.5
"""Probability of each of the four changes, independently."""
BRIGHTNESS = 32.0
"""Largest change of brightness, in levels of 0 to 255."""
FACTORS = (0.5, 1.5)
"""Range of the factors of contrast and saturation."""
HUE = 36.0
"""Largest rotation of the hue, in degrees of 360; the reference has 18 of OpenCV's 180."""
ROWS = 32


class Distortion(NamedTuple):
    """The changes of one image; those that were not drawn are neutral."""

    brightness: float
    """Levels that are added; neutral: 0."""
    contrast: float
    """Factor of all values; neutral: 1."""
    saturation: float
    """Factor of the saturation; neutral: 1."""
    hue: float
    """Rotation of the hue in degrees; neutral: 0."""
    contrast_first: bool
    """Contrast changes before saturation and hue; otherwise it changes last."""


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Draw the changes of one image; `rng` always advances by the same amount."""
    use = rng.random(4) < PROBABILITY
    contrast_first = rng.random() < 0.5
    brightness, contrast = rng.uniform(-BRIGHTNESS, BRIGHTNESS), rng.uniform(*FACTORS)
    saturation, hue = rng.uniform(*FACTORS), rng.uniform(-HUE, HUE)
    return Distortion(
        brightness=brightness if use[0] else 0.0,
        contrast=contrast if use[1] else 1.0,
        saturation=saturation if use[2] else 1.0,
        hue=hue if use[3] else 0.0,
        contrast_first=contrast_first,
    )


def distort(image: Image, distortion: Distortion) -> Image:
    """Return the image with these changes, in the order brightness, contrast, saturation, hue, contrast."""
    d = distortion
    image = change_brightness(image, d.brightness)
    if d.contrast_first:
        image = change_contrast(image, d.contrast)
    image = rotate_hue(change_saturation(image, d.saturation), d.hue)
    return image if d.contrast_first else change_contrast(image, d.contrast)


def change_brightness(image: Image, levels: float) -> Image:
    """Return the image with `levels` added to all values."""
    return image.copy() if levels == 0 else _round(np.arange(256, dtype=np.float32) + levels)[image]


def change_contrast(image: Image, factor: float) -> Image:
    """Return the image with all values multiplied by `factor`: black, not the mean, stays as it is."""
    return image.copy() if factor == 1 else _round(np.arange(256, dtype=np.float32) * factor)[image]


def change_saturation(image: Image, factor: float) -> Image:
    """Return the image with its saturation in HSV, (max - min) / max, multiplied by `factor`, at most to 1.

    Hue and value of each pixel stay: the distances of its channels from the largest one are scaled.
    """

    def change(rows: Image) -> list[Channel]:
        channels, largest, smallest = _channels(rows)
        # The smallest channel of a pixel may fall to 0, at saturation 1, but not below.
        limit = largest / np.maximum(largest - smallest, 1)
        scale = np.minimum(np.float32(factor), np.maximum(limit, 1))
        return [largest - (largest - channel) * scale for channel in channels]

    return image.copy() if factor == 1 else _by_rows(change, image)


def rotate_hue(image: Image, degrees: float) -> Image:
    """Return the image with its hue in HSV rotated by `degrees`; saturation and value of each pixel stay."""

    def change(rows: Image) -> list[Channel]:
        channels, largest, smallest = _channels(rows)
        chroma = largest - smallest
        red, green, blue = ((channel - smallest) / np.maximum(chroma, 1) for channel in channels)
        # In sixths of the circle from red: the largest channel gives the third, the others the place in it.
        third = np.where(channels[1] == largest, 2 + blue - red, 4 + red - green)
        hue = np.where(channels[0] == largest, green - blue, third) + np.float32(degrees / 60)
        return [largest - chroma * _distance(hue + np.float32(start)) for start in (5, 3, 1)]

    return image.copy() if degrees == 0 else _by_rows(change, image)


def _distance(place: Channel) -> Channel:
    """Return how far a channel is below the largest one, in [0, 1] of the chroma.

    This is max(0, min(k, 4 - k, 1)) with k = `place` mod 6, the closed form of the conversion from HSV.
    """
    place = place - 6 * np.floor(place / 6)  # several times faster than np.mod
    return np.clip(np.minimum(place, 4 - place), 0, 1)


def _by_rows(change: Callable[[Image], list[Channel]], image: Image) -> Image:
    """Return the image with `change` applied to a few rows at a time.

    They stay in the processor's cache, which is several times faster than whole maps of float32.
    """
    result = np.empty_like(image)
    for start in range(0, len(image), ROWS):
        rows = slice(start, start + ROWS)
        for i, channel in enumerate(change(image[rows])):
            result[rows, :, i] = _round(channel)
    return result


def _channels(image: Image) -> tuple[list[Channel], Channel, Channel]:
    """Return the three channels `[h, w]` as float32, their maximum and their minimum."""
    red, green, blue = (image[..., i].astype(np.float32) for i in range(3))
    return (
        [red, green, blue],
        np.maximum(np.maximum(red, green), blue),
        np.minimum(np.minimum(red, green), blue),
    )


def _round(values: Channel) -> Image:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
