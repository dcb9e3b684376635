"""The summary that a run prints and writes before its first step."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import torch

from giantdet.architectures import Architecture
from giantdet.config.json_text import json_text
from giantdet.config.resolved import ResolvedRun
from giantdet.config.types import DataConfig
from giantdet.data.dataset import Dataset
from giantdet.data.sampling import sampling_text
from giantdet.distributed import comm
from giantdet.engine import zero
from giantdet.layers.norm import norm_summary
from giantdet.optim.param_groups import group_table
from giantdet.optim.schedules import lr_function

logger = logging.getLogger("giantdet")


def announce(run: ResolvedRun, model: Architecture, device: torch.device) -> None:
    """Print a summary of the run before its first step, on the main rank."""
    if not comm.is_main():
        return
    config, (total, micro_batch, accumulation) = run.giantdet, run.batch
    keys = config.model.class_keys
    classes = ", ".join(
        f"{getattr(config.model, k)} {k.removeprefix('num_').replace('_', ' ')}" for k in keys
    )
    print(
        f"giantdet: {config.model.type}, {config.model.backbone.name}, {classes}, "
        f"canvas {config.data.size}, ZeRO-{run.stage}, {comm.world_size()} ranks on {device.type}, "
        f"{config.train.steps} steps\n"
        f"batch {total} = {micro_batch} images x {accumulation} accumulated x {comm.world_size()} ranks\n"
        + frozen_line(run, model)
        + norm_table(model, micro_batch, accumulation)
        + schedule_line(run)
        + scaling_line(run)
        + group_table(zero.groups_of(model, run), run.optimizer.lr),
        flush=True,
    )


def write_summary(dataset: Dataset, validation: Dataset | None, config: DataConfig, file: Path) -> None:
    """Print what the data sets hold and how they are sampled, and write the former to a JSON file."""
    opened = {"train": dataset} | ({} if validation is None else {"val": validation})
    found = {split: part.summary() for split, part in opened.items()}
    for split, summary in found.items():
        print(summary.text(f"data.{split}"), flush=True)
    print(sampling_text(dataset, config), end="", flush=True)
    content = {split: summary.as_json() for split, summary in found.items()}
    file.write_text(json_text(content, indent=2) + "\n")


def resume_line(first_step: int, steps: int | None, checkpoints: Path) -> str:
    """Return from where a run resumes, or that nothing is left of it."""
    if steps is None or first_step < steps:
        return f"resuming after step {first_step} from {checkpoints}"
    return (
        f"already finished: {checkpoints} has all {first_step} steps, so only the export is written again; "
        "to train longer, raise train.steps or train.epochs; to train again, name another train.output"
    )


def ending(output: Path) -> str:
    """Return where the files of a finished run are, and what to do with them, as lines."""
    export = output / "export"
    found = [
        ("model", export, f"giantdet predict {shlex.quote(str(export))} IMAGES"),
        (
            "checkpoints",
            output / "checkpoints",
            "the same command with more train.steps resumes from the last",
        ),
        ("scores", output / "scores.json", "of the last evaluation; its results are in results.json"),
        ("report", output / "report.html", "open it in a browser"),
        ("plots", output / "losses.png", "losses and learning rate; the numbers are in metrics.jsonl"),
        ("curves", output / "tensorboard", f"tensorboard --logdir {shlex.quote(str(output))}"),
    ]
    rows = [(name, str(path), use) for name, path, use in found if path.exists()]
    width = max((len(path) for _, path, _ in rows), default=0)
    return "\n".join(f"{name:<12} {path:<{width}}  {use}" for name, path, use in rows)


def frozen_line(run: ResolvedRun, model: Architecture) -> str:
    """Return a line on a frozen backbone, with the settings that are without effect; else ""."""
    if not model.backbone.frozen:
        return ""
    count = sum(parameter.numel() for parameter in model.backbone.parameters())
    section = run.giantdet.model.backbone
    idle = [f"backbone.{key}" for key in ("drop_path_rate", "checkpoint_blocks") if getattr(section, key)]
    if run.giantdet.param_groups.layer_decay is not None:
        idle.append("param_groups.layer_decay")
    line = f"backbone frozen: {count:,} parameters in evaluation mode, without gradients and optimizer states"
    return line + (f"; without effect: {', '.join(idle)}\n" if idle else "\n")


def schedule_line(run: ResolvedRun) -> str:
    """Return optimizer, LR, schedule, clipping and averaging as a line that ends with a line break."""
    config, optimizer, scheduler = run.giantdet, run.optimizer, run.scheduler
    parts = [f"{optimizer.name} with LR {optimizer.lr:.4g}"]
    if scheduler is None:
        parts.append("constant")
    else:
        values = ", ".join(f"{key} {value}" for key, value in scheduler.given().items())
        parts.append(f"{scheduler.name} ({values})")
        # DeepSpeed's schedules begin at their minimum, WarmupCosineLR at 0 whatever its minimum.
        parts.append(f"LR {lr_function(scheduler, optimizer.lr)(0):.4g} in the first step")
        peak = getattr(scheduler, "warmup_num_steps", getattr(scheduler, "cycle_first_step_size", 0))
        if isinstance(peak, int) and config.train.steps is not None and peak >= config.train.steps:
            reached = lr_function(scheduler, optimizer.lr)(config.train.steps - 1)
            logger.warning(
                "the warmup of %d steps does not end within the run of %d: the LR only reaches %.4g of %.4g",
                *(peak, config.train.steps, reached, optimizer.lr),
            )
    if run.clipping:
        window = config.train.clip_window
        where = "" if window is None else f" in steps {window[0]} to {window[1]}"
        parts.append(f"gradients clipped at {run.clipping:g}{where}")
    if config.ema.enabled:
        parts.append(f"weights averaged with decay {config.ema.decay:g}")
    return ", ".join(parts) + "\n"


def scaling_line(run: ResolvedRun) -> str:
    """Return what the rules of `lr_scaling` have changed as a line with a line break; empty for none."""
    if not run.scaled:
        return ""
    head, *changes = run.scaled
    return f"{head}: {', '.join(changes)}\n"


def norm_table(model: Architecture, micro_batch: int, accumulation: int) -> str:
    """Return which images the batch norms of each part normalise together, as lines with line breaks."""
    lines = [
        f"  {name.replace('_', ' ')}: {norm_summary(part, micro_batch)}\n"
        for name, part in model.named_children()
    ]
    if accumulation > 1 and any("images" in line for line in lines):
        lines.append(
            f"  accumulation does not enlarge these: each of the {accumulation} micro-steps is normalised "
            "separately and updates the running statistics\n"
        )
    return "batch norms\n" + "".join(lines)
