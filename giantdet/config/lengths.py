"""Lengths of training in steps, epochs or images. Epochs and images do not depend on the batch size."""

from __future__ import annotations

import math
import re

from giantdet.errors import InputError

LENGTH_WORDS = 'a number of steps, or a text like "2 epochs" or "90000 images"'
LENGTH_PATTERN = r"^(\d{1,15}(?:\.\d{1,15})?)\s*(step|epoch|image)s?$"


def is_length(value: object) -> bool:
    """Return whether a value is an integer number of steps, or like "500 steps", "1.5 epochs", "90000
    images".

    Negative integers are lengths too; their users refuse them.
    """
    if isinstance(value, str):
        return re.match(LENGTH_PATTERN, value) is not None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 10**15 and float(value).is_integer()


def times(length: int | float | str, factor: float) -> int | float | str:
    """Return a length in epochs or images times `factor`, as a text; steps and other texts as they are."""
    match = re.match(LENGTH_PATTERN, length) if isinstance(length, str) else None
    if match is None or match[2] == "step":
        return length
    return f"{float(match[1]) * factor:.9f}".rstrip("0").rstrip(".") + f" {match[2]}s"


def to_steps(value: int | float | str, batch: int, images: int | None) -> int | str:
    """Return a length in optimizer steps, rounded up.

    `batch` is the number of images per step. `images` is the number of images per epoch; where it is None, a
    length in epochs is returned as it is. Raises InputError, a ValueError, for a text that is not a length.
    """
    if not isinstance(value, str):
        return int(value)
    match = re.match(LENGTH_PATTERN, value)
    if match is None:
        raise InputError(f"{value!r} is not a length; give {LENGTH_WORDS}")
    number, unit = float(match[1]), match[2]
    if unit == "step":
        return math.ceil(number)
    if unit == "epoch" and images is None:
        return value
    # Rounded to 9 digits before rounding up: floating-point error must not add a step.
    return math.ceil(round(number * (images or 1) / batch if unit == "epoch" else number / batch, 9))
