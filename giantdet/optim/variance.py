"""Gradient variance and noise scale of modules, from products of the gradients of two halves of a batch."""

from __future__ import annotations

import math
from typing import NamedTuple


class Products(NamedTuple):
    """Products of the mean gradients G_1 and G_2 of a module over two halves of the batch.

    `signal` is G_1 G_2, whose expectation is the squared norm of the true gradient; it may be negative.
    `square` is |G_1|^2, signal and noise.
    """

    signal: float
    square: float

    @property
    def variance(self) -> float:
        """Phi = 1 - signal / square, 1 - cos for two fixed halves; NaN where a gradient is zero."""
        return 1.0 - self.signal / self.square if self.square > 0.0 else math.nan


def products_of_halves(dot: float, square_1: float, square_2: float) -> Products:
    """Return the products of two halves; the square is the geometric mean, so that Phi is 1 - cos."""
    return Products(dot, math.sqrt(square_1 * square_2))


def products_of_all_splits(shard_squares: float, mean_square: float, shards: int) -> Products:
    """Return E[G_1 G_2] and E|G_1|^2 over all splits of K shards into halves.

    The estimator follows McCandlish et al. 2018, appendix A, here for a cosine. shard_squares: sum over the
    shards of |g_k|^2. mean_square: |mean of g_k|^2. With C the mean product of two different shards and D the
    mean square, halves of h = K/2 shards have E[G_1 G_2] = C and E|G_1|^2 = D/h + (h - 1)/h C.
    """
    product = (shards**2 * mean_square - shard_squares) / (shards * (shards - 1))
    half = shards / 2
    return Products(product, shard_squares / shards / half + (half - 1) / half * product)


def averaged(before: Products, now: Products, momentum: float) -> Products:
    """Return the exponential moving average of both products, which starts from zero.

    Its ratio is a ratio of weighted means, as noisy signals need it (McCandlish et al. 2018, appendix A.1):
    the weights' sum, less than 1 at the start, cancels.
    """
    return Products(*(momentum * old + (1.0 - momentum) * new for old, new in zip(before, now, strict=True)))


def noise_scale(variance: float, batch: int) -> float:
    """Return the batch size, in images, at which the noise in a module's gradient equals the signal.

    It is B_n of Phi = B_n / (B_n + B/2), infinite where Phi is 1 or more.
    """
    return batch / 2 * variance / (1.0 - variance) if variance < 1.0 else math.inf
