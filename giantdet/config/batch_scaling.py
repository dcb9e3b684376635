"""Rules that scale the values of a run from the batch that they were chosen for to the batch of the run.

kappa is batch / reference batch. Each rule is a pure function with its equation and source;
`scale_with_batch` applies those that the `lr_scaling` section names. Where a value is left alone by all
rules, it stays bit for bit what the JSON says.
"""

from __future__ import annotations

import math
from typing import Any

from giantdet.config.batch import BATCH
from giantdet.config.checks import canonical_name
from giantdet.config.optimizers import OPTIMIZERS, Adam
from giantdet.config.schedulers import SCHEDULERS
from giantdet.config.types import GiantdetConfig, LrScalingConfig
from giantdet.errors import ConfigError

_ADAMS = ("Adam", "AdamW")
# Their step is w -= lr * weight_decay * w, apart from the gradient; Adam's unless adam_w_mode is false.
_DECOUPLED = (*_ADAMS, "Lion", "Muon", "DeepSpeedMuon")


# The rules


def lr_factor(rule: str, kappa: float) -> float:
    """Return the factor of the LRs: kappa (linear; Goyal et al. 2017), its square root (sqrt), 1 (none)."""
    return {"linear": kappa, "sqrt": math.sqrt(kappa), "none": 1.0}[rule]


def sde_beta(beta: float, kappa: float) -> float:
    """Return 1 - kappa (1 - beta), for both betas of Adam.

    This and `sde_eps` are the square-root scaling rule for Adam of Malladi et al. 2022 (arXiv 2205.10287),
    whose third part is the LR times sqrt(kappa). Raises ValueError for kappa (1 - beta) >= 1: no moving
    average has a decay of 0 or less, and the rule's approximation fails long before.
    """
    if kappa * (1 - beta) > 1 - 1e-9:  # 10 x (1 - 0.9) is a little less than 1 in floating point
        raise ValueError(f"{kappa:g} x (1 - {beta:g}) is 1 or more")
    return 1 - kappa * (1 - beta)


def sde_eps(eps: float, kappa: float) -> float:
    """Return eps / sqrt(kappa); see `sde_beta`."""
    return eps / math.sqrt(kappa)


def same_span(decay: float, kappa: float) -> float:
    """Return decay ** kappa: a moving average then forgets at the same rate per image.

    For averages of the weights: Busbridge et al. 2023 (arXiv 2307.13813). For Adam's second beta: the same
    reasoning, which Marek et al. 2025 (arXiv 2507.07101) test as a constant half-life; milder than
    `sde_beta`, and defined for every kappa.
    """
    return float(decay**kappa)


def timescale_weight_decay(weight_decay: float, kappa: float, lr_scale: float) -> float:
    """Return weight_decay x kappa / lr_scale: LR x weight decay per image then stays the same.

    Decoupled decay averages the updates over 1 / (LR x weight decay) steps, a number of epochs that Wang and
    Aitchison 2024 (arXiv 2405.13698) find best to keep constant. A step has kappa times the images, so LR x
    weight decay grows by kappa, and the LR has brought `lr_scale` of it. That the rule may be combined with
    any scaling of the LR is derived here, not from the paper.
    """
    return weight_decay * kappa / lr_scale


# Their application to a run


def scale_with_batch(
    giantdet: GiantdetConfig, deepspeed: dict[str, Any]
) -> tuple[GiantdetConfig, tuple[str, ...]]:
    """Scale the values of a run in place, and return its giantdet block and what has changed, as texts.

    The resolved run has its own batch as the reference, so that resolving it again changes nothing. Raises
    ConfigError for a rule that the run's optimizer, schedule or batch does not allow.
    """
    scaling = giantdet.lr_scaling
    named = {key: getattr(scaling, key) for key in ("rule", "betas", "weight_decay", "ema")}
    named = {key: rule for key, rule in named.items() if rule != "none"}
    if not named:
        return giantdet, ()
    if scaling.reference_batch is None:
        key, rule = next(iter(named.items()))
        what = "learning rate was" if key == "rule" else "values were"
        raise ConfigError(
            f'giantdet.lr_scaling.{key} "{rule}" needs giantdet.lr_scaling.reference_batch, the batch '
            f"that the {what} chosen for"
        )
    _check(giantdet, deepspeed)
    kappa = deepspeed[BATCH] / scaling.reference_batch
    factor = lr_factor(scaling.rule, kappa)
    optimizer = deepspeed["optimizer"]
    params, section = optimizer["params"], OPTIMIZERS[canonical_name(optimizer["type"], OPTIMIZERS) or ""]
    lines: list[str] = []

    def change(name: str, key: str, before: Any, after: Any, rule: str) -> None:
        params[key] = after
        lines.append(f"{name} {_show(before)} to {_show(after)} ({rule})")

    if scaling.rule != "none":
        before = params["lr"]
        _scale_lrs(deepspeed, factor)
        lines.append(f"LR {_show(before)} to {_show(params['lr'])} ({scaling.rule})")
    # At kappa 1 nothing may change, and 1 - (1 - beta) is not always beta.
    if scaling.betas != "none" and kappa != 1:
        betas = tuple(params.get("betas", section.model_fields["betas"].default))
        eps = params.get("eps", section.model_fields["eps"].default)
        if scaling.betas == "sde":
            change("betas", "betas", betas, _sde_betas(betas, kappa), "sde")
            change("eps", "eps", eps, sde_eps(eps, kappa), "sde")
        else:
            change("betas", "betas", betas, [betas[0], same_span(betas[1], kappa)], "beta2_power")
    if scaling.weight_decay != "none" and kappa != 1:
        decay = params.get("weight_decay", section.model_fields["weight_decay"].default)
        after = timescale_weight_decay(decay, kappa, factor)
        change("weight decay", "weight_decay", decay, after, scaling.weight_decay)
    changed: dict[str, Any] = {"lr_scaling": scaling.model_copy(update={"reference_batch": deepspeed[BATCH]})}
    if scaling.ema != "none" and kappa != 1:
        decay = same_span(giantdet.ema.decay, kappa)
        changed["ema"] = giantdet.ema.model_copy(update={"decay": decay})
        lines.append(f"EMA decay {_show(giantdet.ema.decay)} to {_show(decay)} ({scaling.ema})")
    if kappa == 1:
        lines = []
    head = (f"scaled from batch {scaling.reference_batch} to {deepspeed[BATCH]}",) if lines else ()
    return giantdet.model_copy(update=changed), (*head, *lines)


def _scale_lrs(deepspeed: dict[str, Any], factor: float) -> None:
    """Multiply the LRs of the optimizer and of the schedule."""
    scheduler = deepspeed.get("scheduler", {}).get("params", {})
    rates: tuple[str, ...] = ()
    if "scheduler" in deepspeed:
        rates = SCHEDULERS[canonical_name(deepspeed["scheduler"]["type"], SCHEDULERS) or ""].LRS
    if scheduler.get("warmup_min_ratio") == "auto":
        # MegDet's warmup: from the LR of the reference batch to the scaled LR.
        scheduler["warmup_min_ratio"] = min(1.0, 1.0 / factor)
    for block, keys in ((deepspeed["optimizer"]["params"], ("lr", "adam_lr")), (scheduler, rates)):
        for key in keys:
            if isinstance(block.get(key), int | float):
                block[key] = block[key] * factor


def _check(giantdet: GiantdetConfig, deepspeed: dict[str, Any]) -> None:
    """Raise ConfigError for a rule that does not fit the run's other settings."""
    scaling: LrScalingConfig = giantdet.lr_scaling
    optimizer = deepspeed["optimizer"]
    name, params = canonical_name(optimizer["type"], OPTIMIZERS), optimizer["params"]
    if scaling.betas != "none":
        if name not in _ADAMS:
            raise ConfigError(
                f'giantdet.lr_scaling.betas "{scaling.betas}" is a rule for {" and ".join(_ADAMS)}, and the '
                f'optimizer is {name}; set it to "none"'
            )
        if scaling.betas == "sde" and scaling.rule != "sqrt":
            raise ConfigError(
                'giantdet.lr_scaling.betas "sde" belongs to the square-root rule of the LR; set '
                'giantdet.lr_scaling.rule to "sqrt", or betas to "beta2_power"'
            )
        scheduler = deepspeed.get("scheduler", {})
        cycled = canonical_name(scheduler.get("type", ""), SCHEDULERS) == "OneCycle"
        if cycled and scheduler.get("params", {}).get("cycle_momentum", True):
            raise ConfigError(
                f'giantdet.lr_scaling.betas "{scaling.betas}": OneCycle sets the betas in every step; set '
                "scheduler.params.cycle_momentum to false"
            )
    coupled = name in _ADAMS and not params.get("adam_w_mode", Adam.model_fields["adam_w_mode"].default)
    if scaling.weight_decay != "none" and (name not in _DECOUPLED or (name == "Adam" and coupled)):
        raise ConfigError(
            f'giantdet.lr_scaling.weight_decay "{scaling.weight_decay}" is a rule for decoupled weight decay '
            f"({', '.join(_DECOUPLED)}), and that of the optimizer, {name}, goes through its gradient; set "
            'it to "none"'
        )
    if scaling.ema != "none" and not giantdet.ema.enabled:
        raise ConfigError(
            f'giantdet.lr_scaling.ema "{scaling.ema}" scales the decay of giantdet.ema, which is off; set '
            "giantdet.ema.enabled to true, or leave lr_scaling.ema out"
        )


def _sde_betas(betas: tuple[float, ...], kappa: float) -> list[float]:
    try:
        return [sde_beta(beta, kappa) for beta in betas]
    except ValueError as error:
        raise ConfigError(
            f'giantdet.lr_scaling.betas "sde" does not reach this batch: {error}; with betas {list(betas)} '
            f"it must be less than {1 / (1 - min(betas)):g} times the reference batch; or set betas to "
            '"beta2_power"'
        ) from None


def _show(value: Any) -> str:
    return ", ".join(map(_show, value)) if isinstance(value, list | tuple) else f"{value:.4g}"
