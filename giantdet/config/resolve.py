"""Resolve a checked run: compute the batch sizes and the number of steps, and replace every "auto".

The result is a pure function of the run, the number of processes and the size of the data set. So every rank
computes the same result, and `describe` can print it before anything starts.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from giantdet.config.architectures import ArchitectureConfig
from giantdet.config.architectures.common import PartNormConfig
from giantdet.config.batch import ACCUMULATION, BATCH, MICRO, solve_batch
from giantdet.config.batch_scaling import scale_with_batch
from giantdet.config.checks import canonical_name
from giantdet.config.classes import Classes
from giantdet.config.datasets import sections
from giantdet.config.deepspeed import AutoSection, DeepSpeedConfig
from giantdet.config.faster import check_faster
from giantdet.config.identity import first_difference
from giantdet.config.lengths import to_steps
from giantdet.config.load import RunConfig
from giantdet.config.muon import check_agvm_with_muon, check_deepspeed_muon
from giantdet.config.names import nearest
from giantdet.config.optimizers import OPTIMIZERS
from giantdet.config.resolved import ResolvedRun
from giantdet.config.schedulers import SCHEDULERS, SchedulerConfig
from giantdet.config.types import GiantdetConfig
from giantdet.errors import ConfigError

_CLASS_WORDS = {"objects": "classes of objects", "semantic": "semantic maps", "stuff": "classes of stuff"}
# Blocks in which DeepSpeed reads "auto" as "not given".
AUTO_BLOCKS = [
    name for name, field in DeepSpeedConfig.model_fields.items() if isinstance(field.default, AutoSection)
]


def resolve(
    run: RunConfig,
    world_size: int,
    train_images: int | None = None,
    classes: Classes | None = None,
    has_gpu: bool = True,
) -> ResolvedRun:
    """Return the run with every "auto" replaced and every important default made explicit.

    world_size: number of data-parallel processes. train_images, classes: of the training set; None where
    it is unknown (evaluation, --print-config without data). Then `train.steps`, the values that depend on it,
    and the model's numbers of classes stay unresolved. has_gpu: False chooses optimizers that need no
    compiler.

    Raises ConfigError where the values do not fit each other, the processes or the data set.
    """
    deepspeed = copy.deepcopy(run.deepspeed)
    batch, micro, accumulation = solve_batch(deepspeed, world_size)
    deepspeed |= {BATCH: batch, MICRO: micro, ACCUMULATION: accumulation}

    for block in AUTO_BLOCKS:
        if block in deepspeed:
            deepspeed[block] = _without_auto(deepspeed[block])
    # DeepSpeed clips at 1.0 unless told otherwise; detectron2 does not clip.
    if deepspeed.get("gradient_clipping", "auto") == "auto":
        deepspeed["gradient_clipping"] = 0.0
    _resolve_optimizer(deepspeed, has_gpu)

    giantdet, scaled = scale_with_batch(run.giantdet, deepspeed)
    _resolve_monitors(deepspeed, giantdet.train.output)
    _check_norm_parts(giantdet)
    if giantdet.train.steps is None and train_images is not None:
        assert giantdet.train.epochs is not None
        if train_images < 1:
            raise ConfigError("giantdet.data.train has no image to train on; see data.filter_empty")
        steps = math.ceil(giantdet.train.epochs * train_images / batch)
        train = giantdet.train.model_copy(update={"steps": steps, "epochs": None})
        giantdet = giantdet.model_copy(update={"train": train})
    giantdet = _resolve_intervals(giantdet, batch, train_images)
    if "scheduler" in deepspeed:
        _resolve_scheduler(deepspeed, giantdet.train.steps, train_images)
    giantdet = _resolve_clip_window(giantdet, deepspeed, train_images)
    giantdet = _resolve_agvm(giantdet, deepspeed, run.giantdet.lr_scaling.reference_batch)
    check_agvm_with_muon(giantdet.agvm, deepspeed)
    moved = deepspeed.get("zero_optimization", {}).get("offload_optimizer", {})
    if moved.get("device") == "nvme" or moved.get("ratio", 1.0) < 1.0:
        raise ConfigError(
            "zero_optimization.offload_optimizer: checkpoints need the optimizer's state in one memory, of "
            'the GPU or the CPU; set device to "cpu", and leave ratio out'
        )
    offload = deepspeed.get("zero_optimization", {}).get("offload_param", {}).get("device")
    if giantdet.ema.enabled and offload == "nvme":
        raise ConfigError(
            "giantdet.ema needs the weights in memory, but zero_optimization.offload_param moves them to "
            'nvme; set its device to "cpu"'
        )

    check_faster(giantdet, int(deepspeed.get("zero_optimization", {}).get("stage", 0)), has_gpu)

    if classes is not None:
        model = _with_classes(giantdet.model, classes)
        data = giantdet.data.model_copy(
            update={"classes": _agreed(giantdet.data.classes, model.predicted(classes))}
        )
        giantdet = giantdet.model_copy(update={"model": model, "data": data})
    return ResolvedRun(giantdet, deepspeed, run.about, run.path, scaled)


def describe(run: RunConfig) -> str:
    """Return the run as pretty-printed JSON; `load_run` reads it back to the same run."""
    whole: dict[str, Any] = {} if run.about is None else {"about": run.about}
    whole |= run.deepspeed
    whole["giantdet"] = run.giantdet.model_dump(mode="json")
    # One line for each class.
    return re.sub(r'\[\s+(\d+),\s+("[^"\n]*")\s+\]', r"[\1, \2]", json.dumps(whole, indent=2))


def check_data(run: RunConfig, splits: Sequence[str] = ("train", "val")) -> None:
    """Raise ConfigError unless each of the splits is configured and its files exist."""
    for split in splits:
        dataset = getattr(run.giantdet.data, split)
        if dataset is None:
            raise ConfigError(
                f'giantdet.data.{split} is missing; give {{"annotations": ..., "images": ...}}, a COCO '
                "instances JSON and the folder of its images"
            )
        found = [(place, source) for place, section in sections(dataset) for source in section.sources()]
        for place, source in found:
            where = f"giantdet.data.{split}{place}.{source.key}"
            if source.is_folder and not source.path.is_dir():
                raise ConfigError(f"{where}: folder {source.path} does not exist")
            # A folder for a file is left to the reader, which knows what other formats look like.
            if not source.is_folder and not source.path.exists():
                folder = source.path.parent
                beside = [p.name for p in folder.glob(f"*{source.path.suffix}")] if folder.is_dir() else []
                raise ConfigError(
                    f"{where}: file {source.path} does not exist{nearest(source.path.name, beside)}"
                )


def _with_classes(model: ArchitectureConfig, classes: Classes) -> ArchitectureConfig:
    """Return the `model` section with its numbers of classes. Raises ConfigError if they do not fit."""
    numbers: dict[str, int] = {}
    for key, kind in model.class_keys.items():
        declared, found = getattr(model, key), len(getattr(classes, kind))
        if found == 0:
            raise ConfigError(
                f"{model.type} needs {_CLASS_WORDS[kind]}, and the training set has none; change "
                "giantdet.model.type or giantdet.data.train.format"
            )
        if declared != "auto" and declared < found:
            raise ConfigError(
                f"giantdet.model.{key} is {declared}, but the training annotations have "
                f'{found} categories; use "auto" or {found}'
            )
        numbers[key] = found if declared == "auto" else declared
    return model.model_copy(update=numbers)


def _agreed(declared: Classes | None, found: Classes) -> Classes:
    """Return the classes of the data. Raises ConfigError if a run declares others."""
    for kind in ("objects", "semantic"):
        if declared is not None and getattr(declared, kind) != getattr(found, kind):
            difference = first_difference(getattr(declared, kind), getattr(found, kind))
            raise ConfigError(
                f"giantdet.data.classes.{kind} are not those of the training data: {difference}; leave "
                "giantdet.data.classes out to train on the classes of the data"
            )
    return found


def _check_norm_parts(giantdet: GiantdetConfig) -> None:
    """Raise ConfigError if the `norm` block has settings for a part of the model without BatchNorms."""
    norm, parts = giantdet.norm, giantdet.model.batch_norms()
    for name, part in norm:
        if isinstance(part, PartNormConfig) and name not in parts:
            raise ConfigError(
                f"giantdet.norm.{name} is given, but {giantdet.model.type} has no such part: leave it out"
            )
    for name, (where, is_batch) in parts.items():
        if getattr(norm, name) is not None and not is_batch:
            raise ConfigError(
                f"giantdet.norm.{name} is given, but there is no BatchNorm: "
                f'set "norm": "batch" in giantdet.{where}, or leave it out'
            )


def _resolve_intervals(giantdet: GiantdetConfig, batch: int, images: int | None) -> GiantdetConfig:
    """Convert the intervals of evaluations and checkpoints to steps."""
    train = giantdet.train
    found = {key: to_steps(getattr(train, key), batch, images) for key in ("eval_every", "save_every")}
    return giantdet.model_copy(update={"train": train.model_copy(update=found)})


def _resolve_clip_window(
    giantdet: GiantdetConfig, deepspeed: dict[str, Any], images: int | None
) -> GiantdetConfig:
    window = giantdet.train.clip_window
    if window is None:
        return giantdet
    if deepspeed["gradient_clipping"] == 0:
        raise ConfigError(
            "giantdet.train.clip_window is given, but gradient_clipping is 0; set it to the norm to clip at"
        )
    found: Any
    if window == "auto":
        end = _warmup_steps(deepspeed)
        if not isinstance(end, int):
            return giantdet
        found = (max(0, end - 100), end + 100)
    else:
        found = tuple(to_steps(length, deepspeed[BATCH], images) for length in window)
        if all(isinstance(step, int) for step in found) and found[0] > found[1]:
            raise ConfigError(f"giantdet.train.clip_window {list(window)}: give the first step first")
    train = giantdet.train.model_copy(update={"clip_window": found})
    return giantdet.model_copy(update={"train": train})


def _warmup_steps(deepspeed: dict[str, Any]) -> int | str:
    """Return the warmup steps of the resolved schedule; a text if it is in epochs of unknown length."""
    params = deepspeed.get("scheduler", {}).get("params", {})
    steps: int | str = params.get("warmup_num_steps", params.get("cycle_first_step_size", 0))
    return steps


def _resolve_agvm(
    giantdet: GiantdetConfig, deepspeed: dict[str, Any], reference_batch: int | None
) -> GiantdetConfig:
    optimizer = deepspeed["optimizer"]["type"]
    agvm, steps = giantdet.agvm.resolved(optimizer), giantdet.train.steps
    warmup = _warmup_steps(deepspeed)
    if agvm.enabled and agvm.uses_noise_scale:
        agvm = agvm.model_copy(update={"reference_batch": agvm.reference_batch or reference_batch})
        for problem in agvm.problems(optimizer):
            raise ConfigError(f"giantdet.agvm.{problem}")
        if giantdet.lr_scaling.rule != "none":
            raise ConfigError(
                f'giantdet.agvm.rule "{agvm.rule}" scales the LR with the batch, and so does '
                f'giantdet.lr_scaling.rule "{giantdet.lr_scaling.rule}": set the latter to "none"'
            )
    if agvm.start_step == "auto" and steps is not None and isinstance(warmup, int):
        agvm = agvm.model_copy(update={"start_step": warmup + min(100, steps // 10)})
    return giantdet.model_copy(update={"agvm": agvm})


def _without_auto(block: Any) -> Any:
    """Return a block without its "auto" values, which DeepSpeed reads as "not given"."""
    if not isinstance(block, dict):
        return block
    return {key: _without_auto(value) for key, value in block.items() if value != "auto"}


def _resolve_optimizer(deepspeed: dict[str, Any], has_gpu: bool) -> None:
    optimizer = deepspeed["optimizer"]
    name = optimizer["type"] = _name(optimizer, OPTIMIZERS)
    params = optimizer.setdefault("params", {})
    adam = name in ("Adam", "AdamW")
    zero = deepspeed.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    if adam and (offload == "none" or not has_gpu):
        # DeepSpeed's own Adam is compiled at the first use, with nvcc for a GPU; torch's needs no compiler.
        params.setdefault("torch_adam", True)
    if OPTIMIZERS[name].WHOLE_WEIGHTS and zero.get("stage", 0) > 0:
        raise ConfigError(
            f"optimizer.type: {name} works on whole weights, which zero_optimization.stage {zero['stage']} "
            "partitions; set the stage to 0, or use AdamW, SGD or Lion"
            + (", or DeepSpeedMuon" if name == "Muon" else "")
        )
    if name == "DeepSpeedMuon":
        check_deepspeed_muon(deepspeed)
    if zero.get("stage", 0) > 0 and not adam:
        # The run names this optimizer, so DeepSpeed need not ask for a confirmation.
        deepspeed.setdefault("zero_allow_untested_optimizer", True)
    if offload != "none" and (not adam or params.get("torch_adam", False)):
        deepspeed.setdefault("zero_force_ds_cpu_optimizer", False)


def _resolve_monitors(deepspeed: dict[str, Any], output: str) -> None:
    """Let monitors write to the run's folder: DeepSpeed would write to the current one."""
    for block, folder in (("tensorboard", "tensorboard"), ("csv_monitor", "csv")):
        section = deepspeed.get(block, {})
        if section.get("enabled") and not section.get("output_path"):
            section |= {"output_path": output, "job_name": section.get("job_name") or folder}


def _resolve_scheduler(deepspeed: dict[str, Any], steps: int | None, images: int | None) -> None:
    """Convert lengths to steps, and make the defaults explicit that depend on the run or are surprising."""
    scheduler = deepspeed["scheduler"]
    name = scheduler["type"] = _name(scheduler, SCHEDULERS)
    section = SCHEDULERS[name]
    params, fields = scheduler.setdefault("params", {}), section.model_fields
    # Shown in the resolved run: surprising defaults, and values that depend on the run.
    for key in ("warmup_num_steps", "total_num_steps", "warmup_type"):
        if key in fields:
            params.setdefault(key, fields[key].default)
    if not section.FROM_DEEPSPEED:
        params.setdefault("warmup_min_ratio", "auto")
    if steps is not None:
        if params.get("total_num_steps") == "auto":
            params["total_num_steps"] = steps
        if params.get("warmup_num_steps") == "auto":
            params["warmup_num_steps"] = max(1, min(500, round(0.05 * steps)))
    for key in section.LENGTHS:
        if params.get(key, "auto") not in (None, "auto"):
            params[key] = to_steps(params[key], deepspeed[BATCH], images)
    if "milestones" in params:
        _resolve_milestones(params, deepspeed[BATCH], images)
    if params.get("warmup_min_ratio") == "auto":
        params["warmup_min_ratio"] = 0.0 if section.FROM_DEEPSPEED else 1e-3
    if params.get("warmup_min_lr") == "auto":
        params["warmup_min_lr"] = 0.0
    if params.get("warmup_max_lr") == "auto" or (name == "WarmupDecayLR" and "warmup_max_lr" not in params):
        # DeepSpeed's default for the latter is 0.001, whatever the optimizer's LR.
        params["warmup_max_lr"] = deepspeed["optimizer"]["params"]["lr"]
    if deepspeed["optimizer"]["params"].get("lr") == 0:
        _check_zero_lr(params, section)


def _check_zero_lr(params: dict[str, Any], section: type[SchedulerConfig]) -> None:
    """Raise ConfigError if the schedule has an LR of its own, which no parameter group has a share of."""
    for key in section.LRS:
        value = params.get(key, section.model_fields[key].default)
        if isinstance(value, int | float) and value > 0:
            raise ConfigError(
                f"optimizer.params.lr is 0, and scheduler.params.{key} is {value}: the schedule scales the "
                f"optimizer's LR, so set that to the largest LR of the schedule"
            )


def _name(block: dict[str, Any], known: Mapping[str, Any]) -> str:
    """Return the block's type as it is spelt in `known`."""
    name = canonical_name(block["type"], known)
    assert name is not None
    return name


def _resolve_milestones(params: dict[str, Any], batch: int, images: int | None) -> None:
    found = [to_steps(value, batch, images) for value in params["milestones"]]
    if all(isinstance(step, int) for step in found) and found != sorted(set(found)):
        raise ConfigError(
            f"scheduler.params.milestones must increase, got {params['milestones']} ({found} steps)"
        )
    params["milestones"] = found
