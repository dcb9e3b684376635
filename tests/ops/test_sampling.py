"""Sampling: the noise is uniform, independent and pinned; the selection equals a plain loop's."""

from __future__ import annotations

import pytest
import torch

from giantdet.ops.sampling import _mix, sample, uniform_noise


def murmur3_finaliser(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def test_hash_equals_exact_integer_arithmetic():
    numbers = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 123456789]
    assert _mix(torch.tensor(numbers)).tolist() == [murmur3_finaliser(x) for x in numbers]


PINNED = [[1258220, 5959884, 15196641], [3558914, 14236230, 14896548], [8156525, 10392290, 12447425]]


def test_noise_is_pinned():
    """A resumed run must draw what the interrupted one would have: a change here changes every run."""
    bits = (uniform_noise(torch.tensor([0, 7, 2**40 + 1]), 3, salt=1) * 2**24).to(torch.int64)
    assert bits.tolist() == PINNED


def test_noise_is_uniform():
    noise = uniform_noise(torch.arange(64), 16384, salt=0)
    assert noise.dtype == torch.float32
    assert noise.min() >= 0 and noise.max() < 1
    counts = torch.histc(noise.double(), bins=256, min=0, max=1)
    expected = noise.numel() / 256
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 255) < 6 * (2 * 255) ** 0.5
    # Also for each sample and each position, not only overall.
    for dim, number in ((1, 16384), (0, 64)):
        deviation = (noise.mean(dim) - 0.5) * (12 * number) ** 0.5
        assert deviation.abs().max() < 5.5
        assert 0.9 < deviation.std() < 1.1 if dim == 0 else 0.6 < deviation.std() < 1.4


@pytest.mark.parametrize("difference", [1, 2, 1 << 20, 1 << 32, 1 << 45])
def test_seeds_and_salts_are_independent(difference):
    seeds = torch.tensor([12345, 12345 + difference, -5, -5 + difference])
    streams = torch.cat([uniform_noise(seeds, 1 << 16, salt) for salt in (0, 1, 2)]) - 0.5
    correlation = torch.corrcoef(streams.double()) - torch.eye(12)
    assert correlation.abs().max() < 5 / (1 << 8)
    neighbours = torch.corrcoef(torch.cat([streams[:, :-1], streams[:, 1:]]).double()) - torch.eye(24)
    assert neighbours.abs().max() < 5.5 / (1 << 8)


def test_neighbouring_seeds_do_not_share_winners():
    """The top of each sample's noise must not depend on the neighbouring sample's draw."""
    top = uniform_noise(torch.arange(200), 4096, 0).topk(64, dim=1).indices
    drawn = torch.zeros(200, 4096).scatter_(1, top, 1.0)
    shared = drawn @ drawn.T - 64 * torch.eye(200)
    pairs = 200 * 199
    assert abs(shared.sum() / pairs - 1.0) < 0.05
    assert shared.max() <= 9


def test_noise_depends_on_seed_and_position_only():
    seeds = torch.tensor([3, 9, 3])
    noise = uniform_noise(seeds, 100, 4)
    assert noise[0].equal(noise[2]) and not noise[0].equal(noise[1])
    assert uniform_noise(seeds[1:2], 40, 4)[0].equal(noise[1, :40])
    compiled = torch.compile(uniform_noise, fullgraph=True, backend="aot_eager")
    assert compiled(seeds, 100, 4).equal(noise)


def plain_sample(labels: list[int], noise: list[float], num: int, fraction: float) -> tuple[list, list]:
    order = sorted(range(len(labels)), key=lambda i: -noise[i])
    positives = [i for i in order if labels[i] == 1][: int(num * fraction)]
    return positives, [i for i in order if labels[i] == 0][: num - len(positives)]


@pytest.mark.parametrize(("count", "num"), [(300, 64), (300, 300), (40, 64), (1, 64)])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_sample_equals_a_loop(count, num, fraction):
    generator = torch.Generator().manual_seed(count)
    label = torch.randint(-1, 2, (6, count), generator=generator).to(torch.int8)
    label[0], label[1], label[2], label[3, 3:] = 0, 1, -1, -1
    noise = uniform_noise(torch.arange(6), count, 0)
    index, positive, valid = sample(label, noise, num, fraction)
    assert index.shape == positive.shape == valid.shape == (6, min(num, count))
    assert index.min() >= 0 and index.max() < count
    for image in range(6):
        positives, negatives = plain_sample(label[image].tolist(), noise[image].tolist(), num, fraction)
        assert index[image, valid[image]].tolist() == positives + negatives
        assert valid[image].sum() == len(positives) + len(negatives)
        assert positive[image].tolist() == [slot < len(positives) for slot in range(min(num, count))]


def test_sample_compiles():
    label = torch.randint(-1, 2, (2, 100), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    noise = uniform_noise(torch.arange(2), 100, 0)
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(label, noise, 32, 0.5), sample(label, noise, 32, 0.5), strict=True):
        assert got.equal(expected)
