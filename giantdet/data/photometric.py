"""Placeholder."""

from __future__ import annotations

from typing import Any


def distort_colors(image: Any, rng: Any) -> Any:
    raise NotImplementedError
