"""AGVM, the adaptive gradient variance modulator (Xue et al., NeurIPS 2022).

With a large batch the gradients of a detector's modules differ widely in variance: backbone and pyramid train
well where the heads diverge, or the other way round. AGVM measures each module's variance,

    Phi_i = 1 - cos(G_i1, G_i2),

with G_i1 and G_i2 its mean gradients over the two halves of the global batch, and multiplies its LR by

    mu_i = sqrt(Phi_anchor / Phi_i),

smoothed over time, so that the variances align with that of the anchor, the backbone. In a training loop:

    agvm = Agvm(engine, AgvmConfig(enabled=True))
    ...
    engine.backward(loss)
    agvm.observe()  # measures in every `interval`-th step
    agvm.scale()    # scales the LRs of the next optimizer step only
    engine.step()

All ranks call both functions, at every ZeRO stage. `estimators.py` has the ways to measure the variance: the
halves themselves or expectations over all splits, and for Adam as the optimizer would scale the gradients.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from giantdet.config.types import AgvmConfig
from giantdet.distributed import comm
from giantdet.distributed.engine import Engine
from giantdet.errors import InputError
from giantdet.layers.cgbn import CrossGpuBatchNorm
from giantdet.optim.estimators import Variances, estimator_of, shards_of
from giantdet.optim.param_groups import module_of, module_of_group
from giantdet.optim.variance import aligning_factors, noise_scale

logger = logging.getLogger("giantdet")

NAMED_AFTER = 5
"""Measurements after which a module that had a variance in none of them is named in a warning."""


def norms_tie_shards(ranks: int, world: int, estimator: str) -> bool:
    """Return whether batch norms over groups of `ranks` ranks mix images of shards that are compared.

    Halves of the ranks stay separate if both consist of whole groups; halves of the micro-batches (an odd
    world) always do; the single ranks of `all_splits` never do.
    """
    if estimator == "all_splits":
        return ranks > 1
    return world % 2 == 0 and (world // 2) % ranks != 0


class Agvm:
    """Measures the gradients of a DeepSpeed engine and scales its learning rates; see the module's docstring.

    The engine's parameter groups have names, `MODULE` or `MODULE/anything` (`optim/param_groups.py`).

    Raises InputError, a ValueError, where the groups, the anchor, or ranks and micro-batches do not fit.
    """

    def __init__(self, engine: Engine, config: AgvmConfig) -> None:
        optimizer = engine.basic_optimizer
        self.engine, self.config = engine, config.resolved(type(optimizer).__name__)
        trainable = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
        modules = {p: module_of(name, config.modules) for name, p in trainable}
        self.names = sorted(set(modules.values()))
        self._check()
        self.factors = dict.fromkeys(self.names, 1.0)
        self.variances: Variances = {}
        self.estimator = estimator_of(engine, modules, self.config)
        self._active: dict[str, float] = {}
        self._measurements, self._undefined = 0, dict.fromkeys(self.names, 0)
        self._hooks = [p.register_hook(self._reader(p)) for p in modules]
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def _check(self) -> None:
        if self.config.anchor not in self.names:
            raise InputError(
                f"agvm.anchor '{self.config.anchor}' is not a module with trainable parameters: "
                f"{', '.join(self.names)}"
            )
        named = {module_of_group(group) for group in self.engine.basic_optimizer.param_groups}
        if named != set(self.names):
            raise InputError(
                f"agvm: the optimizer's groups belong to the modules {sorted(named)}, the parameters to "
                f"{self.names}; name the groups as optim/param_groups.py does"
            )
        if self.config.clamp[0] > self.config.clamp[1]:
            raise InputError(f"agvm.clamp {list(self.config.clamp)}: give the lower bound first")
        if self.config.start_step == "auto":
            raise InputError('agvm.start_step "auto" needs the schedule of a resolved run: give a step')
        world, accumulation = comm.world_size(), self.engine.gradient_accumulation_steps()
        if shards_of(self.engine) < 2:
            raise InputError(
                "agvm needs two ranks or gradient_accumulation_steps of two: one shard has no variance"
            )
        if self.config.estimator == "half_split" and world % 2 and accumulation % 2:
            raise InputError(
                f"agvm.estimator half_split cannot halve {world} ranks x {accumulation} "
                'micro-batches; take "all_splits", or an even number of one of them'
            )
        norms = [m for m in self.engine.module.modules() if isinstance(m, CrossGpuBatchNorm)]
        ranks = max((comm.group_size(norm.group) for norm in norms), default=1)
        if comm.is_main() and norms_tie_shards(ranks, world, self.config.estimator):
            logger.warning(
                "agvm: batch norms over %d ranks make the gradients that are compared depend on each other, "
                "and the variances come out too large; use half_split and a bn_size that divides half the "
                "batch (docs/agvm.md)",
                ranks,
            )

    # What a training loop calls

    def observe(self) -> None:
        """Measure, after the backward pass of each micro-batch. All ranks call it."""
        self._update(self.estimator.after_step())
        if self.engine.is_gradient_accumulation_boundary() and self._is_measured():
            self._update(self.estimator.after_backward())

    def scale(self) -> None:
        """Apply the factors to the next optimizer step; called before `engine.step()`."""
        self._active = self.factors if self._is_within() else {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps. All ranks call it."""
        self._update(self.estimator.after_step())
        return {"factors": dict(self.factors), "variances": dict(self.variances)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Raises InputError, a ValueError, for a state of other modules."""
        if set(state["factors"]) != set(self.names):
            raise InputError(
                f"agvm: the checkpoint has modules {sorted(state['factors'])}, the run {self.names}"
            )
        self.factors, self.variances = dict(state["factors"]), dict(state["variances"])

    def scalars(self) -> dict[str, float]:
        """Return factor, variance and noise scale (in images) of every module, for the log.

        `undefined` is the share of the measurements in which a module had no variance, and kept its factor.
        """
        found = {f"agvm/{name}/factor": self.factors[name] for name in self.names}
        batch = self.engine.train_batch_size()
        for name, count in self._undefined.items():
            if count:
                found[f"agvm/{name}/undefined"] = count / self._measurements
        for name, variance in self.variances.items():
            if math.isfinite(variance):
                found[f"agvm/{name}/variance"] = variance
                if math.isfinite(scale := noise_scale(variance, batch)):
                    found[f"agvm/{name}/noise_scale"] = scale
        return found

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    # The steps that are measured and scaled

    def _is_within(self) -> bool:
        first, last = self.config.start_step, self.config.stop_step
        assert first != "auto"  # see _check
        return first <= self.engine.global_steps and (last is None or self.engine.global_steps <= last)

    def _is_measured(self) -> bool:
        return self._is_within() and self.engine.global_steps % self.config.interval == 0

    # Hooks

    def _reader(self, p: nn.Parameter) -> Callable[[Tensor], None]:
        def read(gradient: Tensor) -> None:
            if self._is_measured():
                self.estimator.read(p, gradient)

        return read

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Scale the LRs, after the estimator has read the step. Runs once for each group at stages 1 to 3."""
        self.estimator.before_step(optimizer.param_groups)
        for group in optimizer.param_groups:
            group["_agvm_lr"] = group["lr"]
            group["lr"] = group["lr"] * self._active.get(module_of_group(group), 1.0)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group.pop("_agvm_lr")

    def _count(self, variances: Variances) -> None:
        """Count the measurements without a variance of a module, and name it where it never has one."""
        self._measurements += 1
        for name, variance in variances.items():
            self._undefined[name] += math.isnan(variance)
        never = [name for name in self.names if self._undefined[name] == self._measurements]
        if self._measurements == NAMED_AFTER and never and comm.is_main():
            lost = self.config.anchor in never
            logger.warning(
                "agvm: in none of %d measurements did both halves of the batch have a gradient for %s; %s",
                self._measurements,
                ", ".join(never),
                "without its anchor AGVM changes no learning rate" if lost else "its learning rate stays",
            )

    def _update(self, variances: Variances | None) -> None:
        """Move the factors towards those that align the variances.

        A module whose variance is undefined keeps its factor: the gradient of its mask head is zero where
        half of the batch has no object. Without a variance of the anchor all keep theirs.
        """
        if variances is None:
            return
        self._count(variances)
        if math.isnan(variances[self.config.anchor]):
            return
        self.variances = {name: value for name, value in variances.items() if not math.isnan(value)}
        keep = self.config.momentum
        for name, factor in aligning_factors(variances, self.config.anchor, self.config.clamp).items():
            self.factors[name] = keep * self.factors[name] + (1.0 - keep) * factor
