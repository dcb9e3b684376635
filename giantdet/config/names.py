"""The names of all keys that can be set, and suggestions for mistyped ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from giantdet.config.deepspeed import DeepSpeedConfig
from giantdet.config.optimizers import OPTIMIZERS
from giantdet.config.schedulers import SCHEDULERS
from giantdet.config.section import Section
from giantdet.config.types import UNIONS, GiantdetConfig

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "train_batch_size": ("batch", "batch_size", "ims_per_batch", "samples_per_gpu"),
    "gradient_clipping": ("grad_clip", "clip_grad", "clip_grad_norm", "max_grad_norm"),
    "gradient_accumulation_steps": ("accumulate", "accumulation", "accumulation_steps"),
    "optimizer.type": ("optim",),
    "optimizer.params.lr": ("learning_rate", "base_lr", "lr0"),
    "scheduler.type": ("lr_schedule", "lr_scheduler", "lr_config"),
    "scheduler.params.warmup_num_steps": ("warmup", "warmup_steps", "warmup_iters", "warmup_epochs"),
    "giantdet.model.backbone.frozen_stages": ("freeze", "freeze_at"),
    "giantdet.model.init_weights": ("weights", "checkpoint", "load_from"),
    "giantdet.model.num_classes": ("classes", "names", "nc"),
    "giantdet.data.size": ("imgsz", "img_size", "img_scale", "image_size", "input_size", "resolution"),
    "giantdet.data.train.annotations": ("json", "ann_file", "annotation_file"),
    "giantdet.data.train.images": ("path", "img_dir", "image_dir", "img_prefix"),
    "giantdet.train.steps": ("max_iter", "max_iters", "max_steps", "iterations", "num_steps"),
    "giantdet.train.epochs": ("max_epochs", "num_epochs", "num_train_epochs"),
    "giantdet.train.output": ("output_dir", "work_dir", "save_dir", "project"),
    "giantdet.train.save_every": ("save_period", "save_steps", "save_interval", "checkpoint_period"),
    "giantdet.train.eval_every": ("eval_period", "eval_steps", "eval_interval", "val_interval"),
    "giantdet.train.resume": ("resume_from", "resume_from_checkpoint"),
}
"""Settings, and what other trainers call them (detectron2, mmdetection, Ultralytics, Hugging Face)."""
ABSENT = {
    "device": "the launcher chooses the devices: deepspeed --include localhost:0,1, or "
    "DS_ACCELERATOR=cpu for CPUs",
    "gpus": "the launcher chooses the devices: deepspeed --num_gpus 8",
}
"""Settings of other trainers that giantdet does not have, and what to do."""
_OURS = {other: ours for ours, others in OTHER_NAMES.items() for other in others}


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean X?` with the most similar of `names`, or "" if none is similar.

    Names are compared as a whole and by their last part, and with what other trainers call them.
    """
    names, last_part = list(names), name.lower().rsplit(".", 1)[-1]
    if last_part in ABSENT:
        return f"; {ABSENT[last_part]}"
    ours = _OURS.get(last_part, "")
    for candidate in (ours, ours.rsplit(".", 1)[-1]):  # the whole path, or its place among its siblings
        if candidate in names:
            return f"; did you mean {candidate}?"
    short, last = {}, {}
    for candidate in reversed(names):
        key = candidate.lower().removeprefix("giantdet.")
        short[key] = last[key.rsplit(".", 1)[-1]] = candidate
    name = name.lower().removeprefix("giantdet.")
    # The right key in the wrong place: `batch_size` for `giantdet.eval.batch_size`.
    if name.rsplit(".", 1)[-1] in last and name not in short:
        return f"; did you mean {last[name.rsplit('.', 1)[-1]]}?"
    match = difflib.get_close_matches(name, short, n=1, cutoff=0.6)
    if match:
        return f"; did you mean {short[match[0]]}?"
    match = difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1, cutoff=0.75)
    return f"; did you mean {last[match[0]]}?" if match else ""


def keys_of(section: type[Section], chosen: str | None = None) -> dict[str, Any]:
    """Return the nested names of a section's fields; leaves are None.

    A section of one of several types has the keys of the type `chosen`, or those of all types.
    """
    keys: dict[str, Any] = {name: _subsection(info.annotation) for name, info in section.model_fields.items()}
    if section is GiantdetConfig:
        for (*above, last), (_, types) in UNIONS.items():
            parent = keys
            for name in above:
                parent = parent[name]
            possible = [types[chosen]] if chosen is not None and chosen in types else list(types.values())
            parent[last] = {key: inner for section in possible for key, inner in keys_of(section).items()}
    return keys


def _subsection(annotation: Any) -> dict[str, Any] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if hasattr(candidate, "model_fields"):
            return keys_of(candidate)
    return None


def all_paths() -> list[str]:
    """Return the dotted paths of all keys that can be set, for suggestions."""
    paths: list[str] = []

    def walk(keys: dict[str, Any], prefix: str) -> None:
        for key, inner in keys.items():
            paths.append(prefix + key)
            if isinstance(inner, dict):
                walk(inner, f"{prefix}{key}.")

    walk(keys_of(DeepSpeedConfig), "")
    for optimizer in OPTIMIZERS.values():
        walk(keys_of(optimizer), "optimizer.params.")
    for scheduler in SCHEDULERS.values():
        walk(keys_of(scheduler), "scheduler.params.")
    walk(keys_of(GiantdetConfig), "giantdet.")
    return paths
