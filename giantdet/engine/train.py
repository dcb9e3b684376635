"""The training loop. It reads top to bottom; what it calls is named for what it does."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from giantdet.architectures.mask_rcnn import Detector
from giantdet.checkpoint.saver import Checkpoints
from giantdet.config.load import RunConfig
from giantdet.config.resolve import check_data, describe, resolve
from giantdet.data.coco import CocoDataset
from giantdet.data.loader import eval_loader, train_loader
from giantdet.distributed import comm
from giantdet.engine import zero
from giantdet.engine.faults import StepGuard, poisoned, stop_asked, stop_reason
from giantdet.engine.metrics import Metrics
from giantdet.errors import StoppedError
from giantdet.evaluation.coco import check_categories, detect_all, evaluate_results, score_table
from giantdet.export import export_config, export_model
from giantdet.layers.norm import norm_summary
from giantdet.losses import detector_losses, sample_counts, total_loss
from giantdet.optim.agvm import Agvm
from giantdet.optim.ema import WeightEma
from giantdet.optim.param_groups import group_table
from giantdet.tools.plots import plot_run
from giantdet.tools.profile import Profile

logger = logging.getLogger("giantdet")


def train(run: RunConfig, profiled: bool = False) -> dict[str, Any]:
    """Train as the run's JSON says; returns the scores of the last evaluation ({} without one).

    `profiled` records some steps (`profile.py`) into profile/ of it. Writes into `train.output`: config.json
    (resolved), checkpoints/, metrics.jsonl, losses.png, results.json and scores.json of the evaluation,
    export/ (safetensors).
    """
    device = comm.start(run.giantdet.train.timeout_minutes)
    check_data(run, ("train",) if run.giantdet.data.val is None else ("train", "val"))
    settings = run.giantdet.data
    assert settings.train is not None
    dataset = CocoDataset(settings.train.annotations, settings.train.images)
    # Read now: what is wrong with it would end the run at its first evaluation.
    validation = None if settings.val is None else CocoDataset(settings.val.annotations, settings.val.images)
    if validation is not None:
        check_categories(validation, dataset.category_ids, settings.train.annotations)
    train_images = len(dataset.training_indices(settings.filter_empty))
    run = resolve(run, comm.world_size(), train_images, dataset.num_classes, device.type == "cuda")
    config, output = run.giantdet, Path(run.giantdet.train.output)
    if comm.is_main():
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.json").write_text(describe(run) + "\n")
    comm.barrier()

    set_determinism(config.train.deterministic)
    micro_batch = run.deepspeed["train_micro_batch_size_per_gpu"]
    accumulation = run.deepspeed["gradient_accumulation_steps"]
    model = zero.build(run, micro_batch)
    announce(run, model, device)
    engine = zero.initialize(model, run)
    folder = output / "checkpoints"
    agvm = Agvm(engine, config.agvm) if config.agvm.enabled else None
    ema = WeightEma(engine.module, config.ema.decay) if config.ema.enabled else None
    checkpoints = Checkpoints(engine, folder, config.train, agvm, ema)
    first_step = checkpoints.resume() if config.train.resume else 0

    total_steps = config.train.steps
    assert total_steps is not None
    batches = train_loader(
        dataset,
        settings,
        micro_batch,
        comm.rank(),
        comm.world_size(),
        start_micro_step=first_step * accumulation,
        seed=config.train.seed,
        pin_memory=device.type == "cuda",
        masks=config.model.mask_head.enabled,
    )
    if first_step and comm.is_main():
        print(f"going on after step {first_step} from {folder}", flush=True)
    guard = StepGuard(engine, config.train.max_skipped_steps)
    metrics = Metrics(output / "metrics.jsonl", total_steps, first_step, engine.monitor)
    profile = Profile(output / "profile") if profiled and comm.is_main() else None
    scores: dict[str, Any] = {}

    engine.train()
    for step in range(first_step + 1, total_steps + 1):
        zero.set_gradient_clipping(engine, clipping_at(step - 1, run))
        for micro_step in range(accumulation):
            started = time.perf_counter()
            batch = next(batches).to(device)
            data_seconds = time.perf_counter() - started
            seed_step(config.train.seed, step * accumulation + micro_step)

            predictions = engine(batch)
            losses = detector_losses(predictions, config.model.conventions)
            loss = total_loss(losses)
            guard.watch(loss, batch.image_ids_B)
            engine.backward(poisoned(loss))
            if agvm is not None:
                agvm.observe()
                agvm.scale()
            applied = guard.step()  # DeepSpeed steps optimizer and schedule at the last micro-step

            metrics.add({"loss": loss, **losses, **sample_counts(predictions)}, micro_batch, data_seconds)
        if ema is not None and applied:
            ema.update()
        if profile is not None:
            profile.step()
        metrics.step(applied)
        stopping = stop_asked()
        if is_due(step, config.train.log_every, total_steps):
            modulation = agvm.scalars() if agvm is not None else {}
            checkpoints.finish(wait=False)
            line = progress(engine, device, batches.counters, guard.skipped) | checkpoints.counters()
            metrics.log(step, **line, **modulation)
        evaluation_due = is_due(step, config.train.eval_every, total_steps) and not stopping
        checkpoint_due = is_due(step, config.train.save_every, total_steps) or stopping
        if validation is not None and evaluation_due:
            with averaged(ema), zero.averaged_statistics(engine):
                scores = evaluate(engine, run, validation, dataset.category_ids, device)
            engine.train()
            if comm.is_main():
                metrics.write({"step": step, "scores": scores})
        evaluated = validation is not None and evaluation_due
        if checkpoint_due or (evaluated and checkpoints.is_best(scores)):
            checkpoints.save(step, scores if evaluated else None)
        if stopping:
            checkpoints.close()
            raise StoppedError(f"{stop_reason()} after step {step}; the same command goes on from {folder}")
    if profile is not None:
        profile.close()
    metrics.close()
    batches.close()

    exported = export_config(run, dataset.category_ids, dataset.class_names)
    with averaged(ema), zero.averaged_statistics(engine):
        export_model(engine.module, output / "export", exported, config.train.export_shard)
    if comm.is_main():
        plot_run(output / "metrics.jsonl", output)
    checkpoints.close()
    comm.barrier()
    return scores


def evaluate(
    engine: Any, run: RunConfig, dataset: CocoDataset, category_ids: list[int], device: torch.device
) -> dict[str, Any]:
    """COCO scores of the validation set, the same dict on all ranks; the main rank writes and prints them.

    `category_ids` are the training set's, by class index: the model answers in its classes.
    """
    settings, output = run.giantdet.data, Path(run.giantdet.train.output)
    batches = eval_loader(dataset, settings, run.giantdet.eval.batch_size, comm.rank(), comm.world_size())
    engine.eval()
    results = detect_all(engine, batches, device, category_ids, run.giantdet.model.conventions)
    scores: dict[str, Any] = {}
    if comm.is_main():
        with_masks = run.giantdet.model.mask_head.enabled and dataset.has_masks
        scores = evaluate_results(dataset.annotations, results, with_masks)
        (output / "results.json").write_text(json.dumps(results))
        (output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
        print("\n" + score_table(scores), flush=True)
    return comm.broadcast_object(scores)


def is_due(step: int, every: int, total_steps: int) -> bool:
    """Every `every` steps (0: never) and after the last one."""
    return step == total_steps or (every > 0 and step % every == 0)


def averaged(ema: WeightEma | None) -> AbstractContextManager[None]:
    """The average of the weights in the model's place, where the run keeps one."""
    return nullcontext() if ema is None else ema.applied()


def clipping_at(step: int, run: RunConfig) -> float:
    """The norm that the gradient of a step, counted from 0, is clipped at; 0: not at all."""
    limit, window = float(run.deepspeed["gradient_clipping"]), run.giantdet.train.clip_window
    return limit if window is None or int(window[0]) <= step <= int(window[1]) else 0.0


def seed_step(seed: int, micro_step: int) -> None:
    """Dropout and stochastic depth as a function of (seed, micro-step, rank): no RNG state to save."""
    torch.manual_seed(((seed * 1_000_003 + micro_step) * 65_536 + comm.rank()) % 2**63)


def set_determinism(wanted: bool) -> None:
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True  # one shape for the whole run: the search pays off


def progress(engine: Any, device: torch.device, counters: dict[str, int], skipped: int) -> dict[str, Any]:
    """What a log line says beside the losses."""
    rates = zero.learning_rates(engine)
    norm = zero.gradient_norm(engine)
    line: dict[str, Any] = {"lr": max(rates.values()), "memory_gib": zero.peak_memory(device)}
    if norm is not None and math.isfinite(norm):  # DeepSpeed says inf of a step that it left out
        line["grad_norm"] = norm
    if skipped:
        line["skipped_steps"] = skipped
    # What the loaders of all ranks had to leave out: nothing is lost in silence.
    names = sorted(counters)
    totals = comm.mean_over_ranks([float(counters[name] * comm.world_size()) for name in names])
    return line | {name: round(total) for name, total in zip(names, totals, strict=True) if total}


def announce(run: RunConfig, model: Detector, device: torch.device) -> None:
    """Say what is about to happen, once."""
    if not comm.is_main():
        return
    deepspeed, config = run.deepspeed, run.giantdet
    micro_batch = deepspeed["train_micro_batch_size_per_gpu"]
    accumulation = deepspeed["gradient_accumulation_steps"]
    stage = zero.stage_of(run)
    print(
        f"giantdet: {config.model.backbone.name}, {model.num_classes} classes, canvas {config.data.size}, "
        f"ZeRO-{stage}, {comm.world_size()} ranks on {device.type}, {config.train.steps} steps\n"
        f"batch {deepspeed['train_batch_size']} = {micro_batch} images x {accumulation} accumulated"
        f" x {comm.world_size()} ranks\n"
        + norm_table(model, micro_batch, accumulation)
        + schedule_line(run)
        + group_table(zero.groups_of(model, run), deepspeed["optimizer"]["params"]["lr"]),
        flush=True,
    )


def schedule_line(run: RunConfig) -> str:
    """Optimizer, LR, schedule, clipping and averaging, in a line that ends with a line break."""
    deepspeed, config = run.deepspeed, run.giantdet
    optimizer, scheduler = deepspeed["optimizer"], deepspeed.get("scheduler")
    parts = [f"{optimizer['type']} with LR {optimizer['params']['lr']:.4g}"]
    if scheduler is None:
        parts.append("constant")
    else:
        values = ", ".join(f"{key} {value}" for key, value in scheduler["params"].items())
        parts.append(f"{scheduler['type']} ({values})")
    if deepspeed["gradient_clipping"]:
        window = config.train.clip_window
        where = "" if window is None else f" in steps {window[0]} to {window[1]}"
        parts.append(f"gradients clipped at {deepspeed['gradient_clipping']:g}{where}")
    if config.ema.enabled:
        parts.append(f"weights averaged with decay {config.ema.decay:g}")
    return ", ".join(parts) + "\n"


def norm_table(model: Detector, micro_batch: int, accumulation: int) -> str:
    """Which images each part's batch norms see together, in lines that end with a line break."""
    parts = {"backbone": model.backbone, "fpn": model.fpn, "box head": model.box_head}
    if model.mask_head is not None:
        parts["mask head"] = model.mask_head
    lines = [f"  {name}: {norm_summary(part, micro_batch)}\n" for name, part in parts.items()]
    if accumulation > 1 and any("images" in line for line in lines):
        lines.append(
            f"  accumulation adds no image to these: each of the {accumulation} micro-steps is normalised by "
            "itself, and moves the running statistics\n"
        )
    return "batch norms\n" + "".join(lines)
