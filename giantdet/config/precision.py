"""Refuse precisions that exclude each other, and one that DeepSpeed does not train."""

from __future__ import annotations

from giantdet.config.deepspeed import DeepSpeedConfig
from giantdet.errors import ConfigError


def check_precision(config: DeepSpeedConfig) -> None:
    """Raise ConfigError where two precisions are on, or fp16 without ZeRO."""
    on = [name for name in ("bf16", "fp16", "torch_autocast") if getattr(config, name).enabled]
    if len(on) > 1:
        raise ConfigError(f"{' and '.join(f'{n}.enabled' for n in on)} exclude each other; switch one off")
    # https://github.com/deepspeedai/DeepSpeed/pull/8393, measured with 0.19.8: SGD's weights hardly move.
    if on == ["fp16"] and config.zero_optimization.stage == 0:
        raise ConfigError(
            "fp16.enabled: at zero_optimization.stage 0 DeepSpeed divides the gradients by a loss scale that "
            "it has not multiplied the loss by; set the stage to 1, 2 or 3, or bf16.enabled instead"
        )
