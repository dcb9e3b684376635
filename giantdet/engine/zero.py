"""The step from a plain model to a DeepSpeed engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from giantdet.architectures import Architecture, build_model
from giantdet.config.resolved import ResolvedRun
from giantdet.config.schedulers import SchedulerConfig
from giantdet.distributed import comm
from giantdet.distributed.engine import Engine
from giantdet.errors import InputError
from giantdet.export import load_weights
from giantdet.layers.blocks import blocks_of
from giantdet.layers.deferred import deferred_init, is_deferred, real_parameters
from giantdet.layers.norm import moving_norms
from giantdet.optim.optimizers import optimizer_factory
from giantdet.optim.param_groups import parameter_groups
from giantdet.optim.schedules import LrSchedule, lr_function, momentum_function

log = logging.getLogger("giantdet")


def initialize(model: Architecture, run: ResolvedRun) -> Engine:
    """`deepspeed.initialize` with the run's JSON and giantdet's named parameter groups.

    The engine's optimizer, scheduler, precision and ZeRO stage are what the JSON's DeepSpeed keys say.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if any(is_deferred(parameter) for parameter in model.parameters()):
        with _refusal_in_one_line():
            partition(model, run)
    if run.stage == 3 and run.giantdet.model.backbone.compile_blocks:
        # The weights of a compiled block are gathered together before it: no hook stands inside the code.
        for block in blocks_of(run.giantdet.model.backbone, model.backbone.body):
            deepspeed.utils.set_z3_leaf_module(block, True)
    for parameter in model.parameters():
        # DeepSpeed broadcasts weights as bytes, which a channels-last weight cannot be viewed as. A clone:
        # a 1x1 convolution's weight counts as contiguous in either layout, whatever its strides are.
        if parameter.ndim > 1:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    groups = groups_of(model, run)
    with _refusal_in_one_line():
        engine: Engine = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            optimizer=optimizer_factory(run.optimizer),
            lr_scheduler=None
            if run.scheduler is None
            else partial(_schedule, run.scheduler, run.optimizer.lr),
            config=run.deepspeed_json(),
            dist_init_required=False,
        )[0]
    return engine


@contextmanager
def _refusal_in_one_line() -> Iterator[None]:
    """DeepSpeed's and its optimizers' own checks of the JSON, which raise what they like, as a ValueError."""
    try:
        yield
    except (AssertionError, ImportError, ValueError) as error:
        text = " ".join(str(error).split()) or "an assertion failed"
        raise InputError(f"DeepSpeed refuses the run's JSON: {text}") from error


def build(run: ResolvedRun, micro_batch: int) -> Architecture:
    """The run's model with its initial weights; at ZeRO-3 the large ones come with `initialize`."""
    config = run.giantdet
    in_parts = run.stage == 3
    try:
        torch.manual_seed(config.train.seed)  # the same initial weights on every rank
        with deferred_init(config.train.seed) if in_parts else nullcontext():
            model = build_model(config.model, config.data.size, config.norm, micro_batch)
    except NotImplementedError as error:
        if comm.is_main():
            name = config.model.backbone.name
            log.warning("backbone %s cannot be built in parts (%s): each rank builds it whole", name, error)
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.data.size, config.norm, micro_batch)
    load_weights(model, config.model)
    return model


def partition(model: nn.Module, run: ResolvedRun) -> None:
    """Hand a deferred model to ZeRO-3 weight by weight: no rank ever holds more of it than its share and one.

    `zero.Init` asks the module it is given for its parameters, and partitions each before it takes the next.
    """
    import deepspeed

    stream = real_parameters(model, weight_dtype(run))

    class Stream(nn.Module):
        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            return stream

    deepspeed.zero.Init(module=Stream(), config_dict_or_path=run.deepspeed_json())
    device = deepspeed.accelerator.get_accelerator().current_device_name()
    for module in model.modules():  # DeepSpeed leaves those of a partitioned model where they are
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def weight_dtype(run: ResolvedRun) -> torch.dtype:
    """The type that the run's weights and activations have."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[run.precision]


def _schedule(scheduler: SchedulerConfig, lr: float, optimizer: Any) -> LrSchedule:
    return LrSchedule(optimizer, lr_function(scheduler, lr), lr, momentum_function(scheduler))


def groups_of(model: nn.Module, run: ResolvedRun) -> list[dict[str, Any]]:
    """The model's parameter groups with the LR and weight decay of the run's optimizer."""
    optimizer, chosen = run.optimizer, run.giantdet.param_groups
    return parameter_groups(
        model,
        optimizer.weight_decay,
        optimizer.lr,
        run.giantdet.agvm.modules,
        chosen.layer_decay,
        chosen.lr_multipliers,
    )


def learning_rates(engine: Engine) -> dict[str, float]:
    """LR by group name."""
    return {group["name"]: float(group["lr"]) for group in engine.basic_optimizer.param_groups}


def set_gradient_clipping(engine: Engine, limit: float) -> None:
    """Clip the coming steps' gradients at this norm, 0 for none.

    At ZeRO-1 to 3 and in bf16 the limit is the optimizer's, else the engine's configuration's; DeepSpeed
    copies one to the other at the start, and a checkpoint brings its own.
    """
    engine._config.gradient_clipping = limit
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = limit


def gradient_norm(engine: Engine) -> float | None:
    """Norm of the last step's gradient before clipping, or None where DeepSpeed keeps none."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


@contextmanager
def averaged_statistics(engine: Engine) -> Iterator[None]:
    """The mean over the ranks of their batch norms' running statistics in their place, to evaluate or export.

    Each rank's are of its own images. Without this, ranks would evaluate different models, and the one that
    is exported would know the main rank's images alone. All ranks enter and leave it together; afterwards
    the statistics are what they were, so that an evaluation changes nothing for the steps to come.
    """
    pairs = [(norm.running_mean, norm.running_var) for norm in moving_norms(engine.module)]
    statistics = [tensor for pair in pairs for tensor in pair if tensor is not None]
    with torch.no_grad():
        kept = [t.clone() for t in statistics]
        comm.average_(statistics)
        yield
        for tensor, own in zip(statistics, kept, strict=True):
            tensor.copy_(own)


def peak_memory(device: torch.device) -> float:
    """GiB: of the GPU's allocator, or of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
