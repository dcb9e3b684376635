"""A run whose "auto" values are replaced, with typed access to DeepSpeed's half of the JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from giantdet.config.checks import plugin
from giantdet.config.deepspeed import DeepSpeedConfig, ZeroConfig
from giantdet.config.load import RunConfig, load_run
from giantdet.config.optimizers import OptimizerConfig
from giantdet.config.schedulers import SchedulerConfig


class BatchSizes(NamedTuple):
    """Images per optimizer step, images per micro-batch of a rank, and micro-batches per step."""

    total: int
    micro: int
    accumulation: int


@dataclass(frozen=True)
class ResolvedRun(RunConfig):
    """A run whose "auto" values are replaced; `config/resolve.py` makes it.

    Values that depend on a data set stay unresolved where none was given: `train.steps`, lengths in epochs,
    and `model.num_classes`.
    """

    scaled: tuple[str, ...] = ()
    """What the rules of `lr_scaling` have changed, as texts; empty for the config.json of a run."""

    @cached_property
    def _typed(self) -> DeepSpeedConfig:
        return DeepSpeedConfig.model_validate_json(json.dumps(self.deepspeed))

    @property
    def batch(self) -> BatchSizes:
        """The three batch sizes."""
        typed = self._typed
        sizes = (
            typed.train_batch_size,
            typed.train_micro_batch_size_per_gpu,
            typed.gradient_accumulation_steps,
        )
        total, micro, accumulation = (int(size) for size in sizes)
        return BatchSizes(total, micro, accumulation)

    @property
    def zero(self) -> ZeroConfig:
        """The `zero_optimization` block with DeepSpeed's defaults."""
        return self._typed.zero_optimization

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.zero.stage

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """The type of weights and activations."""
        if self._typed.bf16.enabled:
            return "bf16"
        return "fp16" if self._typed.fp16.enabled else "fp32"

    @property
    def clipping(self) -> float:
        """The norm that gradients are clipped at; 0: they are not clipped."""
        return float(self._typed.gradient_clipping)

    @cached_property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer with its parameters."""
        found = plugin("optimizer", self.deepspeed["optimizer"])
        assert isinstance(found, OptimizerConfig)
        return found

    @cached_property
    def scheduler(self) -> SchedulerConfig | None:
        """The LR schedule with its parameters; None: the LR is constant."""
        if "scheduler" not in self.deepspeed:
            return None
        found = plugin("scheduler", self.deepspeed["scheduler"])
        assert isinstance(found, SchedulerConfig)
        return found

    @property
    def monitors(self) -> tuple[str, ...]:
        """The names of the enabled monitors' blocks."""
        typed = self._typed
        names = ("tensorboard", "csv_monitor", "wandb", "comet")
        return tuple(name for name in names if getattr(typed, name).enabled)

    def deepspeed_json(self) -> dict[str, Any]:
        """Return the JSON for `deepspeed.initialize(config=...)`, without the blocks of what giantdet builds.

        DeepSpeed would treat some names of optimizers and schedules in its own way.
        """
        built = {"scheduler"} if self.optimizer.BUILT_BY == "deepspeed" else {"scheduler", "optimizer"}
        return {key: value for key, value in self.deepspeed.items() if key not in built}


def load_resolved(path: str | Path) -> ResolvedRun:
    """Return the run of a config.json that training has written. Raises ConfigError."""
    run = load_run(path)
    return ResolvedRun(run.giantdet, run.deepspeed, run.about, run.path)
