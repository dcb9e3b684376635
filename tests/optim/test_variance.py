"""AGVM's formulas against brute force over all splits of a batch into halves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from giantdet.optim.agvm import norms_tie_shards
from giantdet.optim.param_groups import module_of
from giantdet.optim.variance import (
    aligning_factors,
    noise_scale,
    variance_of_all_splits,
    variance_of_halves,
)


def test_halves() -> None:
    one, two = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 1 - float(torch.cosine_similarity(one, two, 0))
    assert variance_of_halves(float(one @ two), float(one @ one), float(two @ two)) == pytest.approx(expected)
    assert math.isnan(variance_of_halves(0.0, 0.0, 1.0)), "without a gradient there is no variance"


@pytest.mark.parametrize("shards", [2, 4, 6])
@pytest.mark.parametrize("signal", [0.0, 0.3, 3.0])
def test_all_splits(shards: int, signal: float) -> None:
    """1 - mean dot product / mean square of the halves, with means over all ways to halve the shards."""
    generator = torch.Generator().manual_seed(shards)
    gradients = torch.randn(shards, 20, dtype=torch.float64, generator=generator) + signal
    dots, squares = [], []
    for half in itertools.combinations(range(shards), shards // 2):
        rest = [k for k in range(shards) if k not in half]
        one, two = gradients[list(half)].mean(0), gradients[rest].mean(0)
        dots.append(float(one @ two))
        squares.append(float(one @ one))
    expected = 1 - sum(dots) / sum(squares)
    found = variance_of_all_splits(
        float(gradients.square().sum()), float(gradients.mean(0).square().sum()), shards
    )
    assert found == pytest.approx(expected, rel=1e-9)
    assert math.isnan(variance_of_all_splits(0.0, 0.0, shards))


def test_noise_scale_recovers_the_added_noise() -> None:
    """Images with gradient (1, 0, ...) plus noise of total variance B_n = 40 |signal|^2."""
    generator = torch.Generator().manual_seed(0)
    size, batch, scale = 2000, 64, 40.0
    signal = torch.zeros(size, dtype=torch.float64)
    signal[0] = 1.0
    noise = torch.randn(batch, size, dtype=torch.float64, generator=generator) * math.sqrt(scale / size)
    images = signal + noise
    found = variance_of_all_splits(float(images.square().sum()), float(images.mean(0).square().sum()), batch)
    assert noise_scale(found, batch) == pytest.approx(scale, rel=0.1)
    assert noise_scale(1.2, batch) == math.inf


def test_factors() -> None:
    found = aligning_factors(
        {"a": 0.4, "b": 0.1, "c": 1.6, "d": 1e-9, "e": 40.0, "f": math.nan}, "a", (0.5, 10.0)
    )
    assert found == pytest.approx({"a": 1.0, "b": 2.0, "c": 0.5**0.5, "d": 10**0.5, "e": 0.5**0.5}, rel=1e-4)
    assert aligning_factors({"a": math.nan, "b": 0.1}, "a", (0.5, 10.0)) == {}


def test_modules_by_patterns() -> None:
    assert module_of("backbone.body.conv1.weight") == "backbone"
    modules = {"stem": ("encoder.stem.*", "encoder.conv1.*"), "rest": ("*",)}
    assert [module_of(n, modules) for n in ("encoder.conv1.weight", "encoder.layer1.weight")] == [
        "stem",
        "rest",
    ]
    with pytest.raises(ValueError, match="no pattern fits"):
        module_of("head.weight", {"backbone": ("backbone.*",)})


def test_which_batch_norms_couple_the_halves() -> None:
    """Computed from the groups: does one contain ranks of both halves?"""
    for world in (1, 2, 3, 4, 6, 8, 12):
        for ranks in (r for r in range(1, world + 1) if world % r == 0):
            groups = [range(first, first + ranks) for first in range(0, world, ranks)]
            halves = [{int(rank >= world // 2) for rank in group} for group in groups]
            expected = world % 2 == 0 and any(len(half) == 2 for half in halves)
            assert norms_tie_shards(ranks, world, "half_split") == expected
            assert norms_tie_shards(ranks, world, "all_splits") == (ranks > 1)
