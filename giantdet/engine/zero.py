"""The step from a plain model to a DeepSpeed engine."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from giantdet.config.load import RunConfig
from giantdet.distributed import comm
from giantdet.optim.optimizers import optimizer_factory
from giantdet.optim.param_groups import parameter_groups


def initialize(model: nn.Module, run: RunConfig) -> Any:
    """`deepspeed.initialize` with the run's JSON and giantdet's named parameter groups.

    The engine's optimizer, scheduler, precision and ZeRO stage are what the JSON's DeepSpeed keys say.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    for parameter in model.parameters():
        # DeepSpeed broadcasts weights as bytes, which a channels-last weight cannot be viewed as. A clone:
        # a 1x1 convolution's weight counts as contiguous in either layout, whatever its strides are.
        if parameter.ndim > 1:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    config, optimizer = run.deepspeed, run.deepspeed["optimizer"]
    factory = optimizer_factory(optimizer["type"], optimizer.get("params", {}))
    if factory is not None:  # DeepSpeed would take special paths for some of their names
        config = {key: value for key, value in config.items() if key != "optimizer"}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups_of(model, run),
        optimizer=factory,
        config=config,
        dist_init_required=False,
    )
    return engine


def groups_of(model: nn.Module, run: RunConfig) -> list[dict[str, Any]]:
    """The model's parameter groups with the LR and weight decay of the run's optimizer."""
    params = run.deepspeed["optimizer"].get("params", {})
    return parameter_groups(model, params.get("weight_decay", 0.0), params["lr"], run.giantdet.agvm.modules)


def learning_rates(engine: Any) -> dict[str, float]:
    """LR by group name."""
    return {group["name"]: float(group["lr"]) for group in engine.basic_optimizer.param_groups}


def gradient_norm(engine: Any) -> float | None:
    """Norm of the last step's gradient before clipping, or None where DeepSpeed keeps none."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


@torch.no_grad()
def average_statistics(engine: Any) -> None:
    """Give all ranks the mean of their batch norms' running statistics. All ranks call it.

    Each rank's are of its own images. Without this, ranks would evaluate different models, and the one
    that is saved and exported would know the main rank's images alone.
    """
    norms = [m for m in engine.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    statistics = [t for m in norms for t in (m.running_mean, m.running_var) if t is not None]
    comm.average_(statistics)


def peak_memory(device: torch.device) -> float:
    """GiB: of the GPU's allocator, or of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
