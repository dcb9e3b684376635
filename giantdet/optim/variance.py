"""Formulas of AGVM (Xue et al., NeurIPS 2022): gradient variances of modules, and factors that align them."""

from __future__ import annotations

import math

EPSILON = 1e-6  # added to both variances of the ratio, as in the authors' code


def variance_of_halves(dot: float, square_1: float, square_2: float) -> float:
    """Return 1 - cos of the gradients of two halves, from their products; NaN where one gradient is zero."""
    norms = math.sqrt(square_1 * square_2)
    return 1.0 - dot / norms if norms > 0.0 else math.nan


def variance_of_all_splits(shard_squares: float, mean_square: float, shards: int) -> float:
    """Return 1 - E[G_1 G_2] / E|G_1|^2 over all splits of K shards into halves; NaN where that is undefined.

    The estimator follows McCandlish et al. 2018, appendix A, here for a cosine. shard_squares: sum over the
    shards of |g_k|^2. mean_square: |mean of g_k|^2. With C the mean product of two different shards and D the
    mean square, halves of h = K/2 shards have E[G_1 G_2] = C and E|G_1|^2 = D/h + (h - 1)/h C.
    """
    product = (shards**2 * mean_square - shard_squares) / (shards * (shards - 1))
    half = shards / 2
    square = shard_squares / shards / half + (half - 1) / half * product
    return 1.0 - product / square if square > 0.0 else math.nan


def noise_scale(variance: float, batch: int) -> float:
    """Return the batch size, in images, at which the noise in a module's gradient equals the signal.

    It is B_n of Phi = B_n / (B_n + B/2), infinite where Phi is 1 or more.
    """
    return batch / 2 * variance / (1.0 - variance) if variance < 1.0 else math.inf


def aligning_factors(
    variances: dict[str, float], anchor: str, clamp: tuple[float, float]
) -> dict[str, float]:
    """Return the factor mu_i of each module with a finite variance; empty if the anchor's is not finite.

    The ratio of variances is clamped before the square root.
    """
    found = {name: value for name, value in variances.items() if math.isfinite(value)}
    if anchor not in found:
        return {}
    low, high = clamp
    factors = {anchor: 1.0}
    for name in found.keys() - {anchor}:
        ratio = (found[anchor] + EPSILON) / (found[name] + EPSILON)
        factors[name] = math.sqrt(min(max(ratio, low), high))
    return factors
