"""The rules by which gradient statistics of modules become factors of their learning rates: `agvm.rule`.

A rule has two parts, both pure functions. `goals` computes, from each measurement, what the factors should
be; `Agvm` moves its averages of the factors, which start from 1, towards the goals. `applied` turns the
averages into the factors of the LRs.

- agvm: aligns the variances with that of the anchor (Xue et al., NeurIPS 2022).
- uniform: AGVM's mean effect without its distinction of modules: all modules have the geometric mean of its
  factors. A control: what it gains too does not come from a learning rate for each module.
- inverse: AGVM the other way round.
- noise_scale: from the LR of a reference batch, by each module's noise scale (McCandlish et al. 2018 for SGD,
  Li et al. 2024 for Adam).
- noise_scale_uniform: the geometric mean of its factors for all modules, a control as `uniform` is of agvm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

EPSILON = 1e-6  # added to both variances of the ratio, as in the authors' code

Factors = dict[str, float]


class Measurement(NamedTuple):
    """What a rule may use; by module, without the modules whose value is undefined or not known yet."""

    variances: Mapping[str, float]
    """Phi of this step."""
    noise_scales: Mapping[str, float]
    """B_n in images, of the averaged products; infinite where no signal was found in the noise."""


class Setting(NamedTuple):
    """What a rule knows of the run."""

    anchor: str
    clamp: tuple[float, float]
    batch: int
    """Images per optimizer step."""
    reference_batch: int
    """Images per optimizer step that the LR was chosen for."""
    power: float
    """Exponent of the batch in the LR while noise dominates: 1 for SGD, 0.5 for Adam."""


class Rule(NamedTuple):
    """The two parts of a rule; see the module's docstring."""

    goals: Callable[[Measurement, Setting], Factors]
    applied: Callable[[Factors], Factors]


# Goals


def aligning_factors(measured: Measurement, setting: Setting) -> Factors:
    """Return mu_i = sqrt(Phi_anchor / Phi_i) of each module with a variance; empty without the anchor's.

    The ratio of variances is clamped before the square root, as in the authors' code.
    """
    variances, anchor = measured.variances, setting.anchor
    if anchor not in variances:
        return {}
    low, high = setting.clamp
    factors = {anchor: 1.0}
    for name in variances.keys() - {anchor}:
        ratio = (variances[anchor] + EPSILON) / (variances[name] + EPSILON)
        factors[name] = math.sqrt(min(max(ratio, low), high))
    return factors


def noise_scale_factors(measured: Measurement, setting: Setting) -> Factors:
    """Return the factor from the LR of batch B0 to that of batch B by each noise scale B_i, clamped.

    SGD, McCandlish et al. 2018 (arXiv 1812.06162), equation 2.6, eta(B) ~ 1 / (1 + B_i / B):

        s_i = (1 + B_i/B0) / (1 + B_i/B) = (B/B0) (B_i + B0) / (B_i + B)

    Adam and other methods that follow the gradient's sign, Li et al. 2024 ("Surge", arXiv 2405.14578),
    eta(B) ~ 1 / (sqrt(B_i / B) + sqrt(B / B_i)):

        s_i = sqrt(B/B0) (B_i + B0) / (B_i + B)

    These are linear and square-root scaling, times a factor that is 1 while noise dominates (B_i much larger
    than both batches) and B0 / B where the gradient is almost free of noise.
    """
    low, high = setting.clamp
    first, last = setting.reference_batch, setting.batch
    factors = {}
    for name, scale in measured.noise_scales.items():
        damping = (scale + first) / (scale + last) if math.isfinite(scale) else 1.0
        factors[name] = min(max((last / first) ** setting.power * damping, low), high)
    return factors


# Applied


def unchanged(factors: Factors) -> Factors:
    """Return the factors as they are."""
    return factors


def geometric_mean(factors: Factors) -> Factors:
    """Return the geometric mean of the factors for all modules.

    Each module counts once, whatever its size, AGVM's anchor too: the mean logarithm of the LRs stays.
    """
    mean = math.exp(sum(map(math.log, factors.values())) / len(factors))
    return dict.fromkeys(factors, mean)


def reciprocal(factors: Factors) -> Factors:
    """Return 1 / factor."""
    return {name: 1.0 / factor for name, factor in factors.items()}


RULES: dict[str, Rule] = {
    "agvm": Rule(aligning_factors, unchanged),
    "uniform": Rule(aligning_factors, geometric_mean),
    "inverse": Rule(aligning_factors, reciprocal),
    "noise_scale": Rule(noise_scale_factors, unchanged),
    "noise_scale_uniform": Rule(noise_scale_factors, geometric_mean),
}
