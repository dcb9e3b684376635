"""The parts of a run that is ready to train, and what it does beside its steps: evaluate, measure, export."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from giantdet.architectures import Architecture
from giantdet.checkpoint.saver import Checkpoints
from giantdet.config.classes import Classes
from giantdet.config.json_text import json_text
from giantdet.config.resolved import ResolvedRun
from giantdet.data.dataset import Dataset
from giantdet.data.loader import Loader
from giantdet.distributed import comm
from giantdet.distributed.engine import Engine
from giantdet.engine import zero
from giantdet.engine.evaluate import Evaluation, evaluate
from giantdet.engine.lock import OutputLock
from giantdet.engine.metrics import Metrics
from giantdet.engine.progress import say
from giantdet.engine.trackers import ValidationPictures
from giantdet.export import export_config, export_model
from giantdet.optim.agvm import Agvm
from giantdet.optim.ema import WeightEma
from giantdet.structures import Batch


@dataclass
class Training:
    """All parts of a run, ready for its first step."""

    run: ResolvedRun
    device: torch.device
    dataset: Dataset
    validation: Dataset | None
    model: Architecture
    engine: Engine
    agvm: Agvm | None
    ema: WeightEma | None
    checkpoints: Checkpoints
    scored: Classes
    """The model's classes with the ids of the validation set."""
    pictures: ValidationPictures | None
    """Validation images for the run's trackers."""
    first_step: int
    """Number of optimizer steps that were done before."""
    lock: OutputLock

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(self.run.giantdet.train.output)

    @property
    def classes(self) -> Classes:
        """The classes that the model predicts."""
        return self.run.giantdet.data.classes or Classes()

    @contextmanager
    def as_evaluated(self) -> Iterator[None]:
        """Put the weights and statistics to evaluate or export into the model, and restore its own on exit.

        These are the averaged weights, if the run keeps them, and statistics averaged over the ranks.
        """
        with nullcontext() if self.ema is None else self.ema.applied(), zero.averaged_statistics(self.engine):
            yield

    def evaluate(self, batches: Callable[[Loader], Iterable[Batch]] = iter) -> Evaluation:
        """Score the model on the validation set; the main rank writes and prints the scores.

        For `batches` see `evaluate.evaluate`.
        """
        assert self.validation is not None
        config = self.run.giantdet
        self.engine.eval()
        with self.as_evaluated():
            found = evaluate(
                self.engine,
                self.validation,
                config.data,
                config.eval.batch_size,
                self.device,
                tasks=self.model.tasks,
                model_config=config.model,
                classes=self.scored,
                window_stride=config.eval.window_stride,
                max_detections=config.eval.max_detections,
                backend=config.eval.backend,
                results=self.output / "results.json",
                tta=config.eval.tta,
                batches=batches,
                observers=[] if self.pictures is None else [self.pictures],
            )
        self.engine.train()
        if comm.is_main():
            (self.output / "scores.json").write_text(json_text(found.scores, indent=2) + "\n")
            say("\n" + found.table)
            if self.pictures is not None:
                self.pictures.write(self.engine.global_samples)
        return found

    def export(self) -> None:
        """Write the model to the folder export/ of the run."""
        described = export_config(self.run, self.classes)
        with self.as_evaluated():
            shard = self.run.giantdet.train.export_shard
            export_model(self.engine.module, self.output / "export", described, shard)

    def metrics(self) -> Metrics:
        """Return what collects and writes the numbers of the run."""
        config = self.run.giantdet.train
        assert isinstance(config.steps, int) and isinstance(config.eval_every, int), "not resolved"
        every = None if self.validation is None else config.eval_every
        path = self.output / "metrics.jsonl"
        return Metrics(path, config.steps, self.first_step, self.engine.monitor, every)

    def measured(self, counters: dict[str, int], skipped: int) -> dict[str, Any]:
        """Return the values of a log line except the losses and the LRs. All ranks call it.

        `counters` are those of the loader, `skipped` the number of skipped steps.
        """
        norm = zero.gradient_norm(self.engine)
        line: dict[str, Any] = {"memory_gib": zero.peak_memory(self.device)}
        if norm is not None and math.isfinite(norm):  # DeepSpeed returns inf for a step that it skipped
            line["grad_norm"] = norm
        if skipped:
            line["skipped_steps"] = skipped
        # What the loaders of all ranks left out, so that no data is lost silently.
        names = sorted(counters)
        totals = comm.mean_over_ranks([float(counters[name] * comm.world_size()) for name in names])
        line |= {name: round(total) for name, total in zip(names, totals, strict=True) if total}
        line |= self.checkpoints.counters()
        return line | (self.agvm.scalars() if self.agvm is not None else {})
