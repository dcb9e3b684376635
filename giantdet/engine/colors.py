"""Colours of classes: any number of them, each stable, and unlike those of nearby numbers.

They are chosen in OKLCH, where equal steps look equal: L lightness, C chroma, h hue.
Source: B. Ottosson, "A perceptual color space for image processing", 2020,
https://bottosson.github.io/posts/oklab/.
"""

from __future__ import annotations

import functools
import math

Color = tuple[int, int, int]
_GOLDEN = 137.508  # degrees: hues of this step never meet, and each new one falls into the widest gap
_LIGHTNESS = (0.66, 0.76, 0.58)  # in turns, so that hues that come close differ by it
_FIRST_HUE = 250.0  # blue
_SHADES = ((0.0, 0.0), (0.07, 8.0), (-0.07, -8.0), (0.03, -15.0), (-0.04, 13.0))
"""Lightness and hue that are added for the objects of a class, in turns."""


@functools.cache
def color_of(number: int, shade: int = 0, chroma: float = 0.19) -> Color:
    """Return the RGB colour of a class, in one of five shades that tell its objects apart."""
    lightness, hue = _SHADES[shade % len(_SHADES)]
    return _rgb(_LIGHTNESS[number % len(_LIGHTNESS)] + lightness, chroma, _FIRST_HUE + number * _GOLDEN + hue)


def muted_color_of(number: int) -> Color:
    """Return a greyer colour, for what lies behind the objects."""
    return color_of(number, chroma=0.08)


def is_light(color: Color) -> bool:
    """Return whether black letters have more contrast on this colour than white ones.

    By the contrast of WCAG 2.1 both have the same at a luminance of 0.179. White letters look better on
    saturated colours, so they are used up to the luminance at which their contrast is 3, WCAG's least.
    """
    red, green, blue = (_linear(value / 255) for value in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.3


def _rgb(lightness: float, chroma: float, hue: float) -> Color:
    """Return the RGB colour of an OKLCH colour, greyer where a screen cannot show it."""
    while True:
        a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
        long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
        medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
        short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
        linear = (
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        )
        if chroma <= 0 or all(0 <= value <= 1 for value in linear):
            red, green, blue = (round(255 * _gamma(min(max(value, 0.0), 1.0))) for value in linear)
            return red, green, blue
        chroma -= 0.005


def _gamma(value: float) -> float:
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
