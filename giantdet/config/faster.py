"""Checks of the settings that `train.compile` and `train.cuda_graph` do not work with."""

from __future__ import annotations

from giantdet.config.types import GiantdetConfig
from giantdet.errors import ConfigError


def check_faster(giantdet: GiantdetConfig, stage: int, has_gpu: bool) -> None:
    """Raise ConfigError where the training pass of a run at a ZeRO stage cannot be compiled or captured."""
    train, model, norm = giantdet.train, giantdet.model, giantdet.norm
    for key in ("compile", "cuda_graph"):
        if getattr(train, key) and stage == 3:
            raise ConfigError(
                f"giantdet.train.{key} needs all weights in place, but zero_optimization.stage is 3; take "
                "stage 2, or giantdet.model.backbone.compile_blocks"
            )
    if not train.cuda_graph:
        return
    if not has_gpu:
        raise ConfigError("giantdet.train.cuda_graph needs an NVIDIA GPU, and this machine has none")
    # Recomputation asks for the random state, and collectives wait for other ranks: a graph can do neither.
    against = {
        "giantdet.norm.type cgbn": any(part.type == "cgbn" for part in norm.parts().values()),
        "giantdet.model.backbone.checkpoint_blocks": bool(model.backbone.checkpoint_blocks),
        "giantdet.model.checkpoint_heads": model.checkpoint_heads,
    }
    for name, is_on in against.items():
        if is_on:
            raise ConfigError(f"giantdet.train.cuda_graph does not work with {name}; switch one off")
