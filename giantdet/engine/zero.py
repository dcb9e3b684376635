"""Build a run's model and its DeepSpeed engine, and read and set the engine's values."""

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
from giantdet.layers.frozen import DTYPES
from giantdet.layers.norm import moving_norms
from giantdet.layers.precision import cast_buffers
from giantdet.optim.fragments import whole_shape
from giantdet.optim.optimizers import optimizer_factory, with_muon
from giantdet.optim.param_groups import parameter_groups
from giantdet.optim.schedules import LrSchedule, lr_function, momentum_function

log = logging.getLogger("giantdet")


def initialize(model: Architecture, run: ResolvedRun) -> Engine:
    """Return a DeepSpeed engine for a model, with the run's JSON and giantdet's named parameter groups.

    The DeepSpeed keys of the JSON set the engine's optimizer, schedule, precision and ZeRO stage. Raises
    InputError, a ValueError, for a JSON that DeepSpeed refuses.
    """
    import deepspeed

    cast_buffers(model, weight_dtype(run))
    if any(is_deferred(parameter) for parameter in model.parameters()):
        with _refusal_in_one_line():
            partition(model, run)
    if run.stage == 3 and run.giantdet.model.backbone.compile_blocks:
        # All weights of a compiled block are gathered before it, so that no hook runs inside compiled code.
        for block in blocks_of(run.giantdet.model.backbone, model.backbone.body):
            deepspeed.utils.set_z3_leaf_module(block, True)
    for parameter in model.parameters():
        # DeepSpeed broadcasts weights as bytes, and a channels-last weight has no view as bytes. It is
        # cloned, because `contiguous()` leaves the strides of a 1x1 convolution's weight as they are.
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
            config=_with_buckets_of_the_models_size(run, groups),
            dist_init_required=False,
        )[0]
    return engine


def _with_buckets_of_the_models_size(run: ResolvedRun, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON for DeepSpeed with a `reduce_bucket_size` of at most the number of trained weights.

    DeepSpeed allocates all of a bucket (two at `overlap_comm`), by default 500 million elements, however
    small the model is. One that holds all gradients is filled as a larger one would be.
    """
    json = run.deepspeed_json()
    trained = sum(whole_shape(p).numel() for group in groups for p in group["params"])
    if run.stage > 0 and trained < run.zero.reduce_bucket_size:
        json["zero_optimization"] = {**json["zero_optimization"], "reduce_bucket_size": trained}
    return json


@contextmanager
def _refusal_in_one_line() -> Iterator[None]:
    """Raise the errors of DeepSpeed's own checks of the JSON, which have many types, as an InputError."""
    try:
        yield
    except (AssertionError, ImportError, ValueError) as error:
        text = " ".join(str(error).split()) or "an assertion failed"
        raise InputError(f"DeepSpeed refuses the run's JSON: {text}") from error


def build(run: ResolvedRun, micro_batch: int) -> Architecture:
    """Return the run's model with its initial weights; at ZeRO-3 `initialize` allocates the large ones."""
    config = run.giantdet
    in_parts = run.stage == 3
    try:
        torch.manual_seed(config.train.seed)  # the same initial weights on every rank
        with deferred_init(config.train.seed) if in_parts else nullcontext():
            model = build_model(config.model, config.data.size, config.norm, micro_batch)
    except NotImplementedError as error:
        if comm.is_main():
            name = config.model.backbone.name
            log.warning("backbone %s cannot be built in parts (%s): each rank builds all of it", name, error)
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.data.size, config.norm, micro_batch)
    load_weights(model, config.model, config.data.classes)
    return model


def partition(model: nn.Module, run: ResolvedRun) -> None:
    """Partition a deferred model for ZeRO-3 weight by weight.

    A rank never holds more than its own partition and one whole weight: `zero.Init` iterates over the
    parameters of the module that it is given, and partitions each before it takes the next.
    """
    import deepspeed

    stream = real_parameters(model, weight_dtype(run))

    class Stream(nn.Module):
        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            return stream

    deepspeed.zero.Init(module=Stream(), config_dict_or_path=run.deepspeed_json())
    device = deepspeed.accelerator.get_accelerator().current_device_name()
    for module in model.modules():  # DeepSpeed does not move the buffers of a partitioned model
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def weight_dtype(run: ResolvedRun) -> torch.dtype:
    """Return the type of the run's weights and activations."""
    return DTYPES[run.precision]


def _schedule(scheduler: SchedulerConfig, lr: float, optimizer: Any) -> LrSchedule:
    return LrSchedule(optimizer, lr_function(scheduler, lr), lr, momentum_function(scheduler))


def groups_of(model: nn.Module, run: ResolvedRun) -> list[dict[str, Any]]:
    """Return the model's parameter groups with the LR and weight decay of the run's optimizer."""
    optimizer, chosen = run.optimizer, run.giantdet.param_groups
    groups = parameter_groups(
        model,
        optimizer.weight_decay,
        optimizer.lr,
        run.giantdet.agvm.modules,
        chosen.layer_decay,
        chosen.lr_multipliers,
        chosen.decay_norms_and_biases,
    )
    return with_muon(model, groups, optimizer)


def learning_rates(engine: Engine) -> dict[str, float]:
    """Return the current LR by the name of the parameter group."""
    return {group["name"]: float(group["lr"]) for group in engine.basic_optimizer.param_groups}


def highest_rates(rates: dict[str, float]) -> dict[str, float]:
    """Return the highest of the LRs of parameter groups as `lr`, and that of each module as `lr/MODULE`."""
    found = {"lr": max(rates.values())}
    for group, rate in rates.items():
        name = f"lr/{group.partition('/')[0]}"
        found[name] = max(rate, found.get(name, 0.0))
    return found


def set_gradient_clipping(engine: Engine, limit: float) -> None:
    """Clip the gradients of the next steps at this norm; 0: do not clip.

    At ZeRO-1 to 3 and in bf16 DeepSpeed reads the limit from the optimizer, otherwise from the engine's
    configuration. It copies the latter to the optimizer at the start, and a checkpoint restores its own
    value.
    """
    engine._config.gradient_clipping = limit
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = limit


def gradient_norm(engine: Engine) -> float | None:
    """Return the norm of the last step's gradient before clipping, or None where DeepSpeed keeps none.

    With DeepSpeedMuon at ZeRO-1 to 3 it keeps that of Muon's updates, which is not returned.
    """
    groups = engine.basic_optimizer.param_groups
    if engine.zero_optimization_stage() > 0 and any(group.get("use_muon") for group in groups):
        return None
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


@contextmanager
def averaged_statistics(engine: Engine) -> Iterator[None]:
    """Replace the running statistics of batch norms by their mean over the ranks, to evaluate or export.

    The statistics of each rank are those of its own images. Without averaging, the ranks would evaluate
    different models, and the exported statistics would be those of the main rank's images only. All ranks
    enter and leave the context together. On exit the statistics are restored, so that an evaluation does not
    affect training.
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
    """Return the peak memory in GiB: of the GPU's allocator, or of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
