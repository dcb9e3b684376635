"""Rules that scale LR, betas, eps, weight decay and averages with the batch, against their formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_run

from giantdet.config import batch_scaling
from giantdet.config.load import parse_run
from giantdet.config.resolve import describe, resolve
from giantdet.engine.announce import scaling_line, schedule_line
from giantdet.errors import ConfigError

ALL = {"rule": "sqrt", "betas": "sde", "weight_decay": "timescale", "ema": "power"}
PARAMS = {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.05}


def raw_run(scaling: dict[str, Any], batch: int = 64, **deepspeed: Any) -> dict[str, Any]:
    return {
        "train_batch_size": batch,
        "optimizer": {"type": "AdamW", "params": dict(PARAMS)},
        "giantdet": {
            "train": {"steps": 9},
            "ema": {"enabled": True, "decay": 0.999},
            "lr_scaling": {"reference_batch": 16, **scaling},
        },
        **deepspeed,
    }


def test_power_rule_keeps_the_averages_memory_per_image() -> None:
    """Four steps on a constant value with decay d equal one step with d ** 4, and so do two half steps."""
    decay, average = 0.97, 5.0
    for _ in range(4):
        average = decay * average + (1 - decay) * 1.0
    larger = batch_scaling.same_span(decay, 4.0)
    assert larger * 5.0 + (1 - larger) * 1.0 == pytest.approx(average)
    half = batch_scaling.same_span(decay, 0.5)
    assert half * half == pytest.approx(decay)


def test_formulas_of_adams_square_root_rule() -> None:
    """kappa 4, by hand: 1 - 4 x 0.1, 1 - 4 x 0.001, 1e-8 / 2."""
    assert batch_scaling.sde_beta(0.9, 4.0) == pytest.approx(0.6)
    assert batch_scaling.sde_beta(0.999, 4.0) == pytest.approx(0.996)
    assert batch_scaling.sde_beta(0.999, 0.25) == pytest.approx(0.99975)
    assert batch_scaling.sde_eps(1e-8, 4.0) == pytest.approx(5e-9)
    for kappa in (10.0, 11.0):
        with pytest.raises(ValueError, match="1 or more"):
            batch_scaling.sde_beta(0.9, kappa)


@pytest.mark.parametrize("rule", ["none", "sqrt", "linear"])
@pytest.mark.parametrize("kappa", [0.5, 1.0, 6.0])
def test_weight_decay_per_image_is_kept(rule: str, kappa: float) -> None:
    lr, decay, images = 1e-5, 0.05, 96_000
    factor = batch_scaling.lr_factor(rule, kappa)
    scaled = batch_scaling.timescale_weight_decay(decay, kappa, factor)
    small = (1 - lr * decay) ** (images / 16)
    large = (1 - lr * factor * scaled) ** (images / (16 * kappa))
    assert large == pytest.approx(small, rel=1e-7) and small < 0.999


def test_all_rules_in_a_run() -> None:
    run = resolve(parse_run(raw_run(ALL)), 2)
    params = run.deepspeed["optimizer"]["params"]
    assert params["lr"] == pytest.approx(2e-4)
    assert params["betas"] == pytest.approx([0.6, 0.996])
    assert params["eps"] == pytest.approx(5e-7)
    assert params["weight_decay"] == pytest.approx(0.1)
    assert run.giantdet.ema.decay == pytest.approx(0.999**4)
    assert scaling_line(run) == (
        "scaled from batch 16 to 64: LR 0.0001 to 0.0002 (sqrt), betas 0.9, 0.999 to 0.6, 0.996 (sde), eps "
        "1e-06 to 5e-07 (sde), weight decay 0.05 to 0.1 (timescale), EMA decay 0.999 to 0.996 (power)\n"
    )
    # The number of processes does not matter, and the run's own config.json resolves to itself.
    other = resolve(parse_run(raw_run(ALL)), 4)
    assert other.deepspeed["optimizer"] == run.deepspeed["optimizer"] and other.giantdet == run.giantdet
    again = resolve(parse_run(json.loads(describe(run))), 2)
    assert again.deepspeed["optimizer"] == run.deepspeed["optimizer"]
    assert again.giantdet == run.giantdet and scaling_line(again) == ""
    # Defaults of the JSON are scaled too.
    raw = raw_run({"betas": "beta2_power"})
    raw["optimizer"]["params"] = {"lr": 1e-4}
    resolved = resolve(parse_run(raw), 1).deepspeed["optimizer"]["params"]
    assert resolved["betas"] == pytest.approx([0.9, 0.999**4]) and "eps" not in resolved
    assert resolved["lr"] == 1e-4, "no rule scales the LR"


def test_nothing_changes_without_rules_and_at_the_reference_batch() -> None:
    none = resolve(parse_run(raw_run({})), 2)
    same = resolve(parse_run(raw_run(ALL, batch=16)), 2)
    for run in (none, same):
        params = {key: run.deepspeed["optimizer"]["params"][key] for key in PARAMS}
        assert params == PARAMS and run.giantdet.ema.decay == 0.999 and scaling_line(run) == ""


SGD = {"type": "SGD", "params": {"lr": 0.1}}
CYCLE = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-4}}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"betas": "beta2_power", "reference_batch": None}, {}, 'betas "beta2_power" needs .*reference_batch'),
    ({"ema": "power", "reference_batch": None}, {}, 'lr_scaling.ema "power" needs .*reference_batch'),
    ({"betas": "sde"}, {}, 'set giantdet.lr_scaling.rule to "sqrt"'),
    ({"betas": "beta2_power"}, {"optimizer": SGD}, "rule for Adam and AdamW, and the optimizer is SGD"),
    ({"weight_decay": "timescale"}, {"optimizer": SGD}, "decoupled weight decay .*, and that of .* SGD"),
    (
        {"weight_decay": "timescale"},
        {"optimizer": {"type": "Adam", "params": {"lr": 0.1, "adam_w_mode": False}}},
        "decoupled weight decay",
    ),
    ({"betas": "beta2_power"}, {"scheduler": CYCLE}, "set scheduler.params.cycle_momentum to false"),
    (ALL, {"train_batch_size": 160}, "less than 10 times the reference batch"),
    ({"noise_scale": 100, "reference_batch": None}, {}, "noise_scale 100.0 needs .*reference_batch"),
    ({"noise_scale": 100}, {}, "giantdet.train.epochs, not giantdet.train.steps"),
]  # fmt: skip


@pytest.mark.parametrize(("scaling", "deepspeed", "message"), REFUSED)
def test_inapplicable_rules(scaling: dict[str, Any], deepspeed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(parse_run(raw_run(scaling, **deepspeed)), 2)


def test_the_ema_rule_needs_ema() -> None:
    raw = raw_run({"ema": "power"})
    raw["giantdet"]["ema"]["enabled"] = False
    with pytest.raises(ConfigError, match=r"giantdet\.ema, which is off"):
        resolve(parse_run(raw), 2)


def staged(batch: int, noise_scale: float | None) -> dict[str, Any]:
    """Return a run of 12 epochs, with milestones after 8 and 11, in 1600 images."""
    params = {"milestones": ["8 epochs", "11 epochs"], "warmup_num_steps": "1600 images"}
    raw = raw_run({"noise_scale": noise_scale}, batch=batch)
    raw["scheduler"] = {"type": "WarmupMultiStepLR", "params": params}
    raw["gradient_clipping"] = 1.0
    raw["giantdet"]["train"] = {"epochs": 12, "clip_window": ["1 epoch", 500], "eval_every": "1 epoch"}
    return raw


def test_schedules_are_stretched_for_the_same_progress() -> None:
    """B0 = 16, B = 64, B_s = 32: E / E0 = (1 + 2) / (1 + 1/2) = 2, so twice the epochs."""
    run = resolve(parse_run(staged(64, 32)), 1, 1600)
    plain = resolve(parse_run(staged(64, None)), 1, 1600)
    assert plain.giantdet.train.steps == 12 * 25 and run.giantdet.train.steps == 24 * 25
    params = run.deepspeed["scheduler"]["params"]
    assert params["milestones"] == [16 * 25, 22 * 25] and params["warmup_num_steps"] == 2 * 25
    assert run.giantdet.train.clip_window == (2 * 25, 500), "steps stay"
    assert run.giantdet.train.eval_every == 25, "evaluations keep their interval"
    assert scaling_line(run) == (
        "scaled from batch 16 to 64: lengths in epochs and images x 2 (noise scale 32)\n"
    )
    again = resolve(parse_run(json.loads(describe(run))), 1, 1600)
    assert again.giantdet == run.giantdet and again.deepspeed["scheduler"] == run.deepspeed["scheduler"]
    # Far below the noise scale images count, far above it steps: as many as the reference batch takes.
    assert resolve(parse_run(staged(64, 1e15)), 1, 1600).giantdet.train.steps == 12 * 25
    assert resolve(parse_run(staged(64, 1e-6)), 1, 1600).giantdet.train.steps == 12 * 100


NOISE_SCALE = {"enabled": True, "rule": "noise_scale", "estimator": "all_splits"}


def test_the_rule_noise_scale_starts_from_the_lr_of_the_reference_batch() -> None:
    raw = raw_run({"betas": "beta2_power"})
    raw["giantdet"]["agvm"] = NOISE_SCALE
    run = resolve(parse_run(raw), 2)
    assert run.giantdet.agvm.reference_batch == 16 and run.deepspeed["optimizer"]["params"]["lr"] == 1e-4
    again = resolve(parse_run(json.loads(describe(run))), 2)
    assert again.giantdet.agvm == run.giantdet.agvm, "although lr_scaling.reference_batch is now the batch"


@pytest.mark.parametrize(
    ("scaling", "agvm", "optimizer", "message"),
    [
        ({"rule": "sqrt"}, {}, None, 'giantdet.lr_scaling.rule "sqrt": set the latter to "none"'),
        ({"rule": "sqrt"}, {"rule": "noise_scale_uniform"}, None, 'agvm.rule "noise_scale_uniform" scales'),
        ({"reference_batch": None}, {}, None, "giantdet.agvm.rule .* needs agvm.reference_batch"),
        ({}, {"estimator": "half_split"}, None, 'needs agvm.estimator "all_splits"'),
        ({}, {}, {"type": "Lamb", "params": {"lr": 0.1}}, "is for SGD, .* the optimizer is Lamb"),
    ],
)
def test_the_rule_noise_scale_where_it_does_not_fit(
    scaling: dict[str, Any], agvm: dict[str, Any], optimizer: dict[str, Any] | None, message: str
) -> None:
    raw = raw_run(scaling, **({"optimizer": optimizer} if optimizer else {}))
    raw["giantdet"]["agvm"] = NOISE_SCALE | agvm
    with pytest.raises(ConfigError, match=message):
        resolve(parse_run(raw), 2)


@pytest.mark.parametrize(
    ("name", "params", "first"),
    [
        # DeepSpeed's cosine starts at 0 whatever warmup_min_ratio is; its others at their minimum.
        ("WarmupCosineLR", {"warmup_num_steps": 2, "warmup_min_ratio": 0.5}, "0"),
        ("WarmupLR", {"warmup_num_steps": 2, "warmup_min_lr": 1e-4}, "0.0001"),
        ("WarmupCosineDecayLR", {"warmup_num_steps": 2, "warmup_min_ratio": 0.25}, "0.0005"),
    ],
)
def test_first_lr_is_reported(tmp_path: Path, name: str, params: dict[str, Any], first: str) -> None:
    raw = tiny_run(tmp_path, tmp_path, scheduler={"type": name, "params": params})
    raw["giantdet"]["train"]["steps"] = 5
    line = schedule_line(resolve(parse_run(raw), 1, 10))
    assert f"LR {first} in the first step" in line and math.isclose(raw["optimizer"]["params"]["lr"], 0.002)
