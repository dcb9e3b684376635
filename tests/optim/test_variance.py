"""AGVM's formulas against brute force over all splits of a batch into halves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from giantdet.optim.agvm import norms_tie_shards, ranks_of_shard
from giantdet.optim.param_groups import module_of
from giantdet.optim.variance import (
    Products,
    averaged,
    noise_scale,
    products_of_all_splits,
    products_of_halves,
)


def test_halves() -> None:
    one, two = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 1 - float(torch.cosine_similarity(one, two, 0))
    found = products_of_halves(float(one @ two), float(one @ one), float(two @ two))
    assert found.variance == pytest.approx(expected)
    assert math.isnan(products_of_halves(0.0, 0.0, 1.0).variance), "without a gradient there is no variance"


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
    found = products_of_all_splits(
        float(gradients.square().sum()), float(gradients.mean(0).square().sum()), shards
    )
    assert found.signal == pytest.approx(sum(dots) / len(dots), rel=1e-9, abs=1e-12)
    assert found.square == pytest.approx(sum(squares) / len(squares), rel=1e-9)
    assert found.variance == pytest.approx(1 - sum(dots) / sum(squares), rel=1e-9)
    assert math.isnan(products_of_all_splits(0.0, 0.0, shards).variance)


def test_noise_scale_recovers_the_added_noise() -> None:
    """Images with gradient (1, 0, ...) plus noise of total variance B_n = 40 |signal|^2."""
    generator = torch.Generator().manual_seed(0)
    size, batch, scale = 2000, 64, 40.0
    signal = torch.zeros(size, dtype=torch.float64)
    signal[0] = 1.0
    noise = torch.randn(batch, size, dtype=torch.float64, generator=generator) * math.sqrt(scale / size)
    images = signal + noise
    found = products_of_all_splits(float(images.square().sum()), float(images.mean(0).square().sum()), batch)
    assert noise_scale(found.variance, batch) == pytest.approx(scale, rel=0.1)
    assert noise_scale(1.2, batch) == math.inf


def test_averages_find_the_noise_scale_where_single_batches_cannot() -> None:
    """Batches of 16 with B_n = 400: their own noise scales scatter from 0 to infinity."""
    generator = torch.Generator().manual_seed(0)
    size, batch, scale = 500, 16, 400.0
    mean, single = Products(0.0, 0.0), []
    for _ in range(2000):
        images = torch.randn(batch, size, dtype=torch.float64, generator=generator) * math.sqrt(scale / size)
        images[:, 0] += 1.0
        squares = float(images.square().sum()), float(images.mean(0).square().sum())
        now = products_of_all_splits(*squares, batch)
        single.append(noise_scale(now.variance, batch))
        mean = averaged(mean, now, 0.998)
    assert sum(map(math.isinf, single)) > 500
    assert noise_scale(mean.variance, batch) == pytest.approx(scale, rel=0.2)


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
            for accumulation in (1, 2):
                shard = ranks_of_shard(ranks, world, accumulation, "all_splits")
                alone = ranks == world and accumulation == 1  # one group is one shard, which has no variance
                assert norms_tie_shards(ranks, world, "all_splits", shard) == (alone and world > 1)
                assert ranks_of_shard(ranks, world, accumulation, "half_split") == 1
