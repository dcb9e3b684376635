"""Rules of learning rates from variances and noise scales, against their papers' equations."""

from __future__ import annotations

import math

import pytest

from giantdet.optim.rules import RULES, Measurement, Setting

SETTING = Setting("a", (0.5, 10.0), batch=512, reference_batch=32, power=0.5)


def test_agvm_aligns_the_variances_within_the_clamp() -> None:
    variances = {"a": 0.4, "b": 0.1, "c": 1.6, "d": 1e-9, "e": 40.0}
    found = RULES["agvm"].goals(Measurement(variances, {}), SETTING)
    assert found == pytest.approx({"a": 1.0, "b": 2.0, "c": 0.5**0.5, "d": 10**0.5, "e": 0.5**0.5}, rel=1e-4)
    assert RULES["agvm"].goals(Measurement({"b": 0.1}, {}), SETTING) == {}, "there is no anchor"


def test_the_controls_keep_the_mean_of_the_logarithms() -> None:
    """uniform has AGVM's mean logarithm, and no differences; inverse its negative, and the same spread."""
    factors = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 3.0}
    mean = sum(map(math.log, factors.values())) / 4
    assert RULES["agvm"].applied(factors) == factors
    uniform = RULES["uniform"].applied(factors)
    assert uniform == pytest.approx(dict.fromkeys(factors, math.exp(mean)))
    inverse = RULES["inverse"].applied(factors)
    assert {name: factors[name] * f for name, f in inverse.items()} == pytest.approx(dict.fromkeys("abcd", 1))


@pytest.mark.parametrize("scale", [0.7, 32.0, 150.0, 1700.0, 1e5])
def test_noise_scale_equals_the_ratio_of_the_optimal_rates(scale: float) -> None:
    measured = Measurement({}, {"a": scale})
    wide = SETTING._replace(clamp=(1e-3, 1e3))
    adam = [1 / (math.sqrt(scale / b) + math.sqrt(b / scale)) for b in (32, 512)]
    assert RULES["noise_scale"].goals(measured, wide)["a"] == pytest.approx(adam[1] / adam[0])
    sgd = [1 / (1 + scale / b) for b in (32, 512)]
    found = RULES["noise_scale"].goals(measured, wide._replace(power=1.0))["a"]
    assert found == pytest.approx(sgd[1] / sgd[0])


def test_noise_scale_is_total_and_clamped() -> None:
    """Pure noise gives Adam square-root scaling, no noise sqrt(B0/B); SGD linear scaling and 1."""
    measured = Measurement({}, {"noise": math.inf, "none": 0.0})
    assert RULES["noise_scale"].goals(measured, SETTING) == pytest.approx({"noise": 4.0, "none": 0.5})
    wide = SETTING._replace(clamp=(0.01, 100.0))
    assert RULES["noise_scale"].goals(measured, wide) == pytest.approx({"noise": 4.0, "none": 0.25})
    sgd = SETTING._replace(power=1.0)
    assert RULES["noise_scale"].goals(measured, sgd) == pytest.approx({"noise": 10.0, "none": 1.0})
    same = SETTING._replace(batch=32)
    assert RULES["noise_scale"].goals(measured, same) == pytest.approx({"noise": 1.0, "none": 1.0})
