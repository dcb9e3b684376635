"""Refuse what DeepSpeed's Muon does not compute correctly, as measured with DeepSpeed 0.19.8.

docs/schedules.md has the measurements by stage and precision. Convolutions are not among the refusals:
DeepSpeed fails on them, so `optim/optimizers.py` gives them to AdamW.
"""

from __future__ import annotations

from typing import Any

from giantdet.config.types import AgvmConfig
from giantdet.errors import ConfigError

_TESTED = "DeepSpeed 0.19.8"


def check_deepspeed_muon(deepspeed: dict[str, Any]) -> None:
    """Make ZeRO-3's needs explicit. Raises ConfigError where DeepSpeed's Muon is wrong or not tested."""
    zero = deepspeed.get("zero_optimization", {})
    stage, bf16 = zero.get("stage", 0), deepspeed.get("bf16", {}).get("enabled", False)
    if stage > 0 and deepspeed.get("gradient_clipping", 0.0) > 0:
        raise ConfigError(
            f"gradient_clipping: at zero_optimization.stage {stage} {_TESTED} would clip by the norm of "
            "Muon's updates, not of the gradients; set it to 0 with DeepSpeedMuon, or the stage to 0"
        )
    if stage == 0 and bf16:
        raise ConfigError(
            f"optimizer.type: at zero_optimization.stage 0 in bf16 {_TESTED} takes an empty step of "
            "DeepSpeedMuon at the start, which its AdamW counts; set the stage to 1, 2 or 3"
        )
    if deepspeed.get("fp16", {}).get("enabled", False):
        raise ConfigError("optimizer.type: DeepSpeedMuon is not tested in fp16; set bf16.enabled instead")
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device", "none") != "none":
            raise ConfigError(
                f"zero_optimization.{key}: DeepSpeedMuon is not tested with it; leave it out, or use AdamW"
            )
    if zero.get("round_robin_gradients") or zero.get("parameter_alignment"):
        raise ConfigError(
            "zero_optimization: DeepSpeedMuon is not tested with round_robin_gradients and "
            "parameter_alignment; leave them out"
        )
    if stage == 3 and zero.setdefault("reduce_scatter", False):
        raise ConfigError(
            f"zero_optimization.reduce_scatter: {_TESTED} cannot combine it with Muon at stage 3; set it to "
            "false"
        )


def check_agvm_with_muon(agvm: AgvmConfig, deepspeed: dict[str, Any]) -> None:
    """Raise ConfigError for the estimator that reads the gradients in the step, where Muon's updates are."""
    is_muon = deepspeed["optimizer"]["type"] == "DeepSpeedMuon"
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    if is_muon and agvm.enabled and agvm.estimator == "all_splits" and stage > 0:
        raise ConfigError(
            f'giantdet.agvm.estimator "all_splits" reads gradients in the step, where {_TESTED} has replaced '
            f"them by Muon's updates at zero_optimization.stage {stage}; "
            'set it to "half_split"'
        )
