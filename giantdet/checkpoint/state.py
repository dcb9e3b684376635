"""The content of a checkpoint: what is saved of an engine, and how another engine loads it.

Fragments of parameters are saved by name, not as DeepSpeed's flat buffers, so a checkpoint loads at another
world size, ZeRO stage or precision. A resumed run continues the stream of images; data order and random
numbers are pure functions of the step (`data/loader.py`, `engine/train.py`); LR, schedule and decay come from
its JSON.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from giantdet import __version__
from giantdet.checkpoint.files import FORMAT, SavedTensors
from giantdet.config.identity import changes, refusal
from giantdet.distributed import comm
from giantdet.distributed.engine import Engine
from giantdet.errors import InputError
from giantdet.layers.weights import persistent_buffers
from giantdet.optim.agvm import Agvm
from giantdet.optim.ema import WeightEma
from giantdet.optim.fragments import (
    create_states,
    fragments,
    local_share,
    publish,
    share_of,
    shares,
    whole_shape,
)

logger = logging.getLogger("giantdet")

# Attributes of DeepSpeed's two kinds of loss scaler.
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


# Saving


def local_tensors(
    engine: Engine, ema: WeightEma | None, copy: bool = False
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the tensors that this rank saves, by KIND/PARAMETER, and the first element of each.

    They are in the CPU's memory: views of tensors that are already there, unless `copy`.
    """
    tensors: dict[str, Tensor] = {}
    firsts: dict[str, int] = {}

    def put(kind: str, name: str, first: int, tensor: Tensor) -> None:
        if tensor.numel() > 0:
            firsts[f"{kind}/{name}"] = first
            tensors[f"{kind}/{name}"] = tensor.detach().to("cpu", copy=copy)

    held = shares(engine)
    for name, p in engine.module.named_parameters():
        if p in held:
            fragment = held[p]
            put("weight", name, fragment.first, fragment.weights())
            elements, values = fragment.state(engine.basic_optimizer)
            for key, tensor in elements.items():
                put(key, name, fragment.first, tensor)
            for key, value in values.items() if fragment.first == 0 else ():
                put(key, name, 0, torch.tensor(float(value), dtype=torch.float64))
        elif not p.requires_grad:
            put("weight", name, share_of(p)[0], local_share(p))
    if ema is not None:
        for name, share in ema.shares.items():
            put("ema", name, share_of(ema.parameters[name])[0], share)
    for name, buffer in persistent_buffers(engine.module).items():
        put("buffer", name, 0, buffer)  # each rank has its own running statistics
    return tensors, firsts


def describe_state(
    engine: Engine, step: int, agvm: Agvm | None, ema: WeightEma | None, identity: dict[str, Any]
) -> dict[str, Any]:
    """Return all state that is not a tensor, for JSON. All ranks call it."""
    import deepspeed

    scaler, groups = _loss_scaler(engine), engine.basic_optimizer.param_groups
    return {
        "format": FORMAT,
        "step": step,
        "identity": identity,
        "images": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "groups": [group["name"] for group in groups],
        "group_steps": {group["name"]: float(group["step"]) for group in groups if "step" in group},
        "agvm": agvm.state_dict() if agvm is not None else None,
        "ema_steps": ema.steps if ema is not None else None,
        "loss_scaler": {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)},
        "parameters": {
            name: {"shape": list(whole_shape(p)), "dtype": str(p.dtype).removeprefix("torch.")}
            for name, p in engine.module.named_parameters()
        },
        "optimizer": type(engine.basic_optimizer).__name__,
        "ranks": comm.world_size(),
        "zero_stage": int(engine.zero_optimization_stage()),
        "versions": {
            "giantdet": __version__,
            "torch": str(torch.__version__),
            "deepspeed": deepspeed.__version__,
        },
    }


# Resuming


def check_fit(engine: Engine, saved: SavedTensors, identity: dict[str, Any]) -> None:
    """Raise InputError, a ValueError, unless the checkpoint has the run's classes, model and groups.

    Settings that may change are named in a warning. Checkpoints of earlier versions have no identity.
    """
    before = saved.state.get("identity", {})
    if problem := refusal(before, identity):
        raise InputError(
            f"{saved.folder}: {problem}; set another train.output, and to fine-tune, model.init_weights"
        )
    if comm.is_main():
        for change in changes(before, identity):
            logger.warning("%s: %s", saved.folder, change)
    groups = {group["name"] for group in engine.basic_optimizer.param_groups}
    if different := sorted(groups ^ set(saved.state["groups"])):
        where = "the run" if different[0] in groups else "the checkpoint"
        raise InputError(
            f"{saved.folder}: saved with other parameter groups: {different[0]} is only in {where}; "
            f"{len(different)} groups differ"
        )
    here = {name: list(whole_shape(p)) for name, p in engine.module.named_parameters()}
    there = {name: about["shape"] for name, about in saved.state["parameters"].items()}
    if different := [name for name in here | there if here.get(name) != there.get(name)]:
        name = different[0]
        raise InputError(
            f"{saved.folder}: saved from another model: {name} is {there.get(name, 'not there')}, in the run "
            f"{here.get(name, 'not there')}; {len(different)} parameters differ"
        )


@torch.no_grad()
def load_tensors(engine: Engine, saved: SavedTensors, ema: WeightEma | None) -> None:
    """Load weights, optimizer's state, buffers and averages: each rank reads its part. All ranks call it.

    Raises ValueError for the state of another optimizer.
    """
    optimizer = engine.basic_optimizer
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()
    create_states(engine)
    held = fragments(engine)
    for name, p in engine.module.named_parameters():
        if p in held:
            fragment = held[p]
            fragment.weights().copy_(saved.read("weight", name, fragment.first, fragment.last))
            elements, values = fragment.state(optimizer)
            there = saved.kinds[name] - {"weight", "ema"}
            if (
                there and there != elements.keys() | values.keys()
            ):  # empty: the parameter never had a gradient
                raise InputError(
                    f"{saved.folder}: saved by {saved.state['optimizer']} with {sorted(there)}, "
                    f"the run's {type(optimizer).__name__} has {sorted([*elements, *values])}"
                )
            for key, tensor in elements.items() if there else ():
                tensor.copy_(saved.read(key, name, fragment.first, fragment.last))
            for key, tensor in fragment.whole_state(optimizer).items() if there else ():
                tensor.copy_(saved.read(key, name, 0, tensor.numel()))
            for key in values if there else ():
                _assign(optimizer.state[fragment.owner], key, float(saved.whole(key, name)))
        elif not p.requires_grad:
            if hasattr(p, "ds_id"):
                local_share(p).copy_(saved.read("weight", name, *share_of(p)))
            else:  # each rank saves a share of it, and needs all of it
                p.copy_(saved.read("weight", name, 0, p.numel()).view_as(p))
    for group in optimizer.param_groups:
        if "step" in group and group["name"] in saved.state["group_steps"]:
            _assign(group, "step", saved.state["group_steps"][group["name"]])
    own = comm.rank() if saved.state["ranks"] == comm.world_size() else None
    for name, buffer in persistent_buffers(engine.module).items():
        buffer.copy_(saved.buffer(name, own))
    publish(engine)
    if ema is not None:
        _load_averages(ema, saved)


def _load_averages(ema: WeightEma, saved: SavedTensors) -> None:
    if saved.state["ema_steps"] is None:
        ema.restart()
        if comm.is_main():
            logger.warning("%s has no averages of the weights: averaging starts here", saved.folder)
        return
    ema.steps = saved.state["ema_steps"]
    for name, share in ema.shares.items():
        share.copy_(saved.read("ema", name, *share_of(ema.parameters[name])))


def load_counters(engine: Engine, saved: SavedTensors) -> int:
    """Set the engine's counters, schedule and loss scale; return the number of steps done.

    With another global batch that is the number of whole batches in the images seen.
    """
    state, batch = saved.state, engine.train_batch_size()
    step, rest = divmod(state["images"], batch)
    if step != state["step"] and comm.is_main():
        again = f"; {rest} of them are seen again" if rest else ""
        logger.warning(
            "%s: %d images in %d steps are %d steps of this run's batch of %d%s",
            *(saved.folder, state["images"], state["step"], step, batch, again),
        )
    engine.global_steps, engine.global_samples = step, step * batch
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.skipped_steps = state["skipped_steps"] * step // max(1, state["step"])
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.go_to(step - engine.skipped_steps)
    scaler = _loss_scaler(engine)
    for key in state["loss_scaler"]:
        if hasattr(scaler, key):
            setattr(scaler, key, state["loss_scaler"][key])
    return int(step)


def _loss_scaler(engine: Engine) -> Any:
    """Return the loss scaler of fp16, None in other precisions."""
    if not engine.fp16_enabled():
        return None
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def _assign(state: dict[str, Any], key: str, value: float) -> None:
    """Set a single value in the optimizer's own type: a tensor, an integer, a flag."""
    if isinstance(state[key], Tensor):
        state[key].fill_(value)
    else:
        state[key] = type(state[key])(value)
