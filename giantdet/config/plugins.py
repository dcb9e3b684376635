"""What the `optimizer` and `scheduler` blocks of a run's JSON may contain, by type.

Values are described as in config/deepspeed_keys.py, with LENGTH for steps, epochs or images
(config/lengths.py). `tests/config/test_plugins.py` compares the tables with what they stand for.
"""

from __future__ import annotations

from giantdet.config.deepspeed_keys import Spec

LENGTH = "length"

_ADAM = {
    "lr": float,
    "betas": list,
    "eps": float,
    "weight_decay": float,
    "torch_adam": bool,
    "adam_w_mode": bool,
    "foreach": bool,
    "fp32_optimizer_states": bool,
}

# Every optimizer that giantdet has trained with, and its parameters. Adam and AdamW are DeepSpeed's, SGD is
# torch.optim's. (Adagrad loses its parameter groups at ZeRO-1 and 2: DeepSpeed 0.19 makes it anew.)
_TIMM: dict[str, dict[str, Spec]] = {
    "Lion": {"lr": float, "betas": list, "weight_decay": float},
    "Lamb": {
        "lr": float,
        "betas": list,
        "eps": float,
        "weight_decay": float,
        "bias_correction": bool,
        "grad_averaging": bool,
        "trust_clip": bool,
        "always_adapt": bool,
        "decoupled_decay": bool,
    },
    "Lars": {
        "lr": float,
        "momentum": float,
        "dampening": float,
        "weight_decay": float,
        "nesterov": bool,
        "trust_coeff": float,
        "eps": float,
        "trust_clip": bool,
        "always_adapt": bool,
    },
    "Muon": {
        "lr": float,
        "momentum": float,
        "nesterov": bool,
        "weight_decay": float,
        "betas": list,
        "ns_steps": int,
        "adjust_lr_fn": ("original", "match_rms_adamw"),
    },
}

OPTIMIZERS: dict[str, dict[str, Spec]] = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "SGD": {
        "lr": float,
        "momentum": float,
        "dampening": float,
        "weight_decay": float,
        "nesterov": bool,
        "foreach": bool,
    },
    **_TIMM,
}
# Built by optim/optimizers.py; the second kind needs whole weights, which ZeRO-1 to 3 take apart.
TIMM_OPTIMIZERS = tuple(_TIMM)
WHOLE_WEIGHT_OPTIMIZERS = ("Lamb", "Lars", "Muon")

_WARMUP = {"warmup_num_steps": LENGTH, "warmup_type": ("linear", "log")}
_OUR_WARMUP = {
    "warmup_num_steps": LENGTH,
    "warmup_type": ("linear", "exponential", "constant"),
    "warmup_min_ratio": float,
}

# Of the LRs DeepSpeed's would also take a list, one value by position: here groups are many, and their LRs
# follow from giantdet.param_groups.
DEEPSPEED_SCHEDULERS: dict[str, dict[str, Spec]] = {
    "WarmupLR": {**_WARMUP, "warmup_min_lr": float, "warmup_max_lr": float},
    "WarmupDecayLR": {
        **_WARMUP,
        "warmup_min_lr": float,
        "warmup_max_lr": float,
        "total_num_steps": LENGTH,
    },
    "WarmupCosineLR": {
        **_WARMUP,
        "warmup_min_ratio": float,
        "cos_min_ratio": float,
        "total_num_steps": LENGTH,
    },
    "OneCycle": {
        "cycle_min_lr": float,
        "cycle_max_lr": float,
        "decay_lr_rate": float,
        "cycle_first_step_size": LENGTH,
        "cycle_second_step_size": LENGTH,
        "cycle_first_stair_count": int,
        "cycle_second_stair_count": int,
        "decay_step_size": LENGTH,
        "cycle_momentum": bool,
        "cycle_min_mom": float,
        "cycle_max_mom": float,
        "decay_mom_rate": float,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": float,
        "lr_range_test_step_size": LENGTH,
        "lr_range_test_step_rate": float,
        "lr_range_test_staircase": bool,
    },
}

SCHEDULERS: dict[str, dict[str, Spec]] = {
    **DEEPSPEED_SCHEDULERS,
    "WarmupMultiStepLR": {**_OUR_WARMUP, "milestones": list, "gamma": object},
    "WarmupCosineDecayLR": {**_OUR_WARMUP, "total_num_steps": LENGTH, "min_ratio": float},
    "WarmupPolyLR": {**_OUR_WARMUP, "total_num_steps": LENGTH, "power": float, "min_ratio": float},
}

# Scheduler parameters without a default.
SCHEDULER_REQUIRED = {"OneCycle": ("cycle_min_lr", "cycle_max_lr"), "WarmupMultiStepLR": ("milestones",)}
# LRs in there: those of the optimizer's LR, scaled with it.
SCHEDULER_LRS = ("warmup_min_lr", "warmup_max_lr", "cycle_min_lr", "cycle_max_lr", "lr_range_test_min_lr")
# Lengths in there that are divided by.
SCHEDULER_PERIODS = (
    "total_num_steps",
    "cycle_first_step_size",
    "cycle_second_step_size",
    "lr_range_test_step_size",
)
# What config/resolve.py computes.
AUTO_SCHEDULER = (
    "total_num_steps",
    "warmup_num_steps",
    "warmup_min_lr",
    "warmup_max_lr",
    "warmup_min_ratio",
)
