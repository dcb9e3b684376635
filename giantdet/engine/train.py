"""The training loop and its preparation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from giantdet.architectures import total_loss
from giantdet.checkpoint.saver import Checkpoints
from giantdet.config.classes import Classes
from giantdet.config.identity import identity
from giantdet.config.load import RunConfig
from giantdet.config.resolve import check_data, describe, resolve
from giantdet.config.resolved import ResolvedRun
from giantdet.data.dataset import (
    Dataset,
    check_files,
    check_targets,
    meet,
    nothing_to_train,
    open_dataset,
)
from giantdet.data.images import limit_pixels
from giantdet.data.loader import train_loader
from giantdet.distributed import comm
from giantdet.engine import faster, zero
from giantdet.engine.announce import announce, resume_line, write_summary
from giantdet.engine.environment import record_start
from giantdet.engine.evaluate import check_windows, warn_of_limits
from giantdet.engine.faults import StepGuard, poisoned, stop_asked, stop_reason
from giantdet.engine.lock import OutputLock
from giantdet.engine.metrics import Metrics
from giantdet.engine.trackers import prepare_trackers, validation_pictures, write_config
from giantdet.engine.training import Training
from giantdet.engine.tta import check_tta
from giantdet.errors import StoppedError
from giantdet.evaluation import Scores
from giantdet.evaluation.backends import check_backend
from giantdet.layers.body import check_name
from giantdet.layers.frozen import check_frozen, check_left_out
from giantdet.layers.model_names import with_timm_name
from giantdet.layers.norm import check_norms
from giantdet.optim.agvm import Agvm
from giantdet.optim.ema import WeightEma

logger = logging.getLogger("giantdet")


def prepare(run: RunConfig) -> Training:
    """Open the data, resolve the run, build and partition the model, and resume from the newest checkpoint.

    Raises InputError, a ValueError, for settings, data or a checkpoint that cannot be used.
    """
    run = _with_timm_name(run)
    check_name(run.giantdet.model.backbone.name)  # before anything that takes time
    check_left_out(run.giantdet.model, run.giantdet.train.export_backbone)
    device = comm.start(run.giantdet.train.timeout_minutes)
    check_data(run, ("train",) if run.giantdet.data.val is None else ("train", "val"))
    data = run.giantdet.data
    assert data.train is not None
    limit_pixels(data.max_image_pixels)
    dataset = open_dataset(data.train)
    # Opened now, so that an error in it ends the run at once and not at its first evaluation.
    validation = None if data.val is None else open_dataset(data.val)
    images = len(dataset.training_indices(data.filter_empty))
    if not images:
        raise nothing_to_train(dataset)
    for opened in (dataset, validation):
        if opened is not None:
            check_files(opened)
    resolved = resolve(run, comm.world_size(), images, dataset.classes, device.type == "cuda")
    check_norms(resolved.giantdet.norm, resolved.batch.micro, comm.world_size())
    scored = Classes()
    if validation is not None:
        known = resolved.giantdet.model.predicted(dataset.classes)
        scored = meet(validation, known, dataset.annotations)
    lock = OutputLock(Path(resolved.giantdet.train.output))
    try:
        return _build(resolved, device, dataset, validation, scored, lock)
    except BaseException:
        lock.release()
        raise


def _with_timm_name(run: RunConfig) -> RunConfig:
    """Return the run with timm's own name of its backbone, so that its config.json needs no hub."""
    model = run.giantdet.model
    model = model.model_copy(update={"backbone": with_timm_name(model.backbone)})
    return replace(run, giantdet=run.giantdet.model_copy(update={"model": model}))


def _build(
    run: ResolvedRun,
    device: torch.device,
    dataset: Dataset,
    validation: Dataset | None,
    scored: Classes,
    lock: OutputLock,
) -> Training:
    """Build the parts of a resolved run, and resume; the run's config.json is written if it can."""
    config, output = run.giantdet, Path(run.giantdet.train.output)
    prepare_trackers(run)
    set_determinism(config.train.deterministic)
    model = zero.build(run, run.batch.micro)
    check_targets(dataset, model.targets, model.WITHOUT_MASKS)
    check_windows(model.tasks, config.eval.window_stride)
    if config.eval.tta is not None:
        check_tta(model, config.eval.window_stride)
    if validation is not None:
        check_backend(config.eval.backend)
        warn_of_limits(validation, config.model, config.eval.max_detections)
    announce(run, model, device)
    engine = zero.initialize(model, run)
    faster.apply(model, run, device)  # before AGVM adds its hooks to the parameters
    agvm = Agvm(engine, config.agvm) if config.agvm.enabled else None
    ema = WeightEma(engine.module, config.ema.decay) if config.ema.enabled else None
    checkpoints = Checkpoints(engine, output / "checkpoints", config.train, agvm, ema, identity(run))
    first_step = checkpoints.resume() if config.train.resume else 0
    if not first_step:
        check_frozen(model.backbone, config.model)
    if comm.is_main():
        # Not before: that of a run whose checkpoints do not fit must stay.
        (output / "config.json").write_text(describe(run) + "\n")
        write_config(run, engine.monitor)
        write_summary(dataset, validation, config.data, output / "data.json")
        if first_step < (config.train.steps or 0):
            record_start(run, device, first_step, output / "environment.json")
        if first_step:
            print(resume_line(first_step, config.train.steps, checkpoints.folder), flush=True)
    comm.barrier()
    pictures = validation_pictures(run, engine.monitor, validation, model)
    return Training(
        *(run, device, dataset, validation, model, engine, agvm, ema, checkpoints, scored),
        *(pictures, first_step, lock),
    )


def train(run: RunConfig, after_step: Callable[[], None] = lambda: None) -> Scores:
    """Train as the run's JSON says, and return the scores of the last evaluation ({} without one).

    Writes to `train.output`: config.json (resolved), checkpoints/, metrics.jsonl, results.json and
    scores.json of the evaluation, export/ (safetensors). `after_step` is called after every optimizer step.

    Raises InputError for settings or data that cannot be used, DivergedError where gradients are no longer
    finite, and StoppedError, after saving a checkpoint, where the run was asked to stop.
    """
    training = prepare(run)
    metrics = training.metrics()
    try:
        return _train(training, metrics, after_step)
    finally:
        metrics.close()
        training.lock.release()
        training.engine.destroy()  # its hooks would keep the weights and the process groups


def _train(training: Training, metrics: Metrics, after_step: Callable[[], None]) -> Scores:
    engine, model, agvm, checkpoints = training.engine, training.model, training.agvm, training.checkpoints
    config, (_, micro_batch, accumulation) = training.run.giantdet.train, training.run.batch
    total_steps = config.steps
    assert total_steps is not None
    batches = train_loader(
        training.dataset,
        training.run.giantdet.data,
        micro_batch,
        comm.rank(),
        comm.world_size(),
        start_micro_step=training.first_step * accumulation,
        seed=config.seed,
        pin_memory=training.device.type == "cuda",
        targets=model.targets,
    )
    guard = StepGuard(engine, config.max_skipped_steps)
    scores: Scores = {}

    engine.train()
    for step in range(training.first_step + 1, total_steps + 1):
        zero.set_gradient_clipping(engine, clipping_at(step - 1, training.run))
        for micro_step in range(accumulation):
            started = time.perf_counter()
            batch = next(batches).to(training.device)
            data_seconds = time.perf_counter() - started
            seed_step(config.seed, step * accumulation + micro_step)

            predictions = engine(batch)
            losses = model.losses(predictions, batch)
            loss = total_loss(losses)
            guard.watch(loss, batch.image_ids_B)
            engine.backward(poisoned(loss))
            if agvm is not None:
                agvm.observe()
                agvm.scale()
            rates = zero.learning_rates(engine)  # the step advances the schedule
            applied = guard.step()  # DeepSpeed steps optimizer and schedule at the last micro-step
            metrics.add({"loss": loss, **losses, **model.counts(predictions)}, micro_batch, data_seconds)
        if training.ema is not None and applied:
            training.ema.update()
        after_step()
        metrics.step(applied)
        stopping = stop_asked()
        if is_due(step, config.log_every, total_steps):
            checkpoints.finish(wait=False)
            values = zero.highest_rates(rates) | training.measured(batches.counters, guard.skipped)
            metrics.log(step, engine.global_samples, **values)
        score = None
        if training.validation is not None and is_due(step, config.eval_every, total_steps) and not stopping:
            with metrics.progress.evaluating():
                scores, score, _ = training.evaluate(metrics.progress.batches)
            metrics.write_scores(step, scores, engine.global_samples)
        if is_due(step, config.save_every, total_steps) or stopping or checkpoints.is_best(score):
            checkpoints.save(step, score)
        if stopping:
            checkpoints.close()
            raise StoppedError(
                f"{stop_reason()} after step {step}; the same command resumes from {checkpoints.folder}"
            )
    batches.close()
    metrics.progress.exporting()
    training.export()
    checkpoints.close()
    comm.barrier()
    return scores


def is_due(step: int, every: int | str, total_steps: int) -> bool:
    """Return whether something is due after a step: every `every` steps (0: never), and after the last."""
    assert isinstance(every, int), f"{every!r} is not resolved"
    return step == total_steps or (every > 0 and step % every == 0)


def clipping_at(step: int, run: ResolvedRun) -> float:
    """Return the norm that the gradient of a step, counted from 0, is clipped at; 0: it is not clipped."""
    limit, window = run.clipping, run.giantdet.train.clip_window
    return limit if window is None or int(window[0]) <= step <= int(window[1]) else 0.0


def seed_step(seed: int, micro_step: int) -> None:
    """Seed torch from (seed, micro-step, rank), so that checkpoints need no state of random generators."""
    torch.manual_seed(((seed * 1_000_003 + micro_step) * 65_536 + comm.rank()) % 2**63)


def set_determinism(wanted: bool) -> None:
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True  # shapes are fixed, so the search runs only once
