"""Lengths of time in training: steps, epochs or images, as a recipe that outlives a batch size says them."""

from __future__ import annotations

import math
import re

from giantdet.errors import InputError

LENGTH_WORDS = 'a number of steps, or a text like "2 epochs" or "90000 images"'
LENGTH_PATTERN = r"^(\d{1,15}(?:\.\d{1,15})?)\s*(step|epoch|image)s?$"


def is_length(value: object) -> bool:
    """An integer (steps, 0 or more), or `"500 steps"`, `"1.5 epochs"`, `"90000 images"`."""
    if isinstance(value, str):
        return re.match(LENGTH_PATTERN, value) is not None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 10**15 and float(value).is_integer()


def to_steps(value: int | float | str, batch: int, images: int | None) -> int | str:
    """Optimizer steps of a length, rounded up; the length itself where it needs an unknown epoch.

    batch: images a step. images: of an epoch; None where unknown.
    """
    if not isinstance(value, str):
        return int(value)
    match = re.match(LENGTH_PATTERN, value)
    if match is None:
        raise InputError(f"{value!r} is no length; give {LENGTH_WORDS}")
    number, unit = float(match[1]), match[2]
    if unit == "step":
        return math.ceil(number)
    if unit == "epoch" and images is None:
        return value
    # The rounding keeps 0.3 x 10 at 3.
    return math.ceil(round(number * (images or 1) / batch if unit == "epoch" else number / batch, 9))
