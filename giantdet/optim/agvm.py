"""AGVM, the adaptive gradient variance modulator (Xue et al., NeurIPS 2022).

With a large batch the gradients of a detector's modules differ widely in variance: backbone and pyramid train
well where the heads diverge, or the other way round. AGVM measures each module's variance,

    Phi_i = 1 - cos(G_i1, G_i2),

with G_i1 and G_i2 its mean gradients over the two halves of the global batch, and multiplies its LR by

    mu_i = sqrt(Phi_anchor / Phi_i),

smoothed over time, so that the variances align with that of the anchor, the backbone. `rules.py` has other
rules that make factors of the same measurements. In a training loop:

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
from giantdet.optim.estimators import Measured, estimator_of, shards_of
from giantdet.optim.param_groups import module_of, module_of_group
from giantdet.optim.rules import RULES, Measurement, Setting
from giantdet.optim.variance import Products, averaged, noise_scale

logger = logging.getLogger("giantdet")

NAMED_AFTER = 5
"""Measurements after which a module that had a variance in none of them is named in a warning."""


def ranks_of_shard(ranks: int, world: int, accumulation: int, estimator: str) -> int:
    """Return how many consecutive ranks are one shard, with batch norms over groups of `ranks` ranks.

    all_splits: one group, unless that were the only shard; half_split does not count shards.
    """
    is_enough = world % ranks == 0 and world // ranks * accumulation >= 2
    return ranks if estimator == "all_splits" and is_enough else 1


def norms_tie_shards(ranks: int, world: int, estimator: str, shard: int = 1) -> bool:
    """Return whether batch norms over groups of `ranks` ranks mix images of shards that are compared.

    Halves of the ranks stay separate if both consist of whole groups; halves of the micro-batches (an odd
    world) always do; the shards of `all_splits`, of `shard` ranks each, if they are whole groups.
    """
    if estimator == "all_splits":
        return shard % ranks != 0
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
        ranks = self._check(type(optimizer).__name__)
        self.rule, batch = RULES[self.config.rule], engine.train_batch_size()
        self._setting = Setting(
            self.config.anchor,
            self.config.clamp,
            batch,
            self.config.reference_batch or batch,
            self.config.power(type(optimizer).__name__),
        )
        self.factors = dict.fromkeys(self.names, 1.0)
        self.variances: dict[str, float] = {}
        self.products = dict.fromkeys(self.names, Products(0.0, 0.0))
        self.estimator = estimator_of(engine, modules, self.config, ranks)
        self._active: dict[str, float] = {}
        self._measurements, self._undefined = 0, dict.fromkeys(self.names, 0)
        self._hooks = [p.register_hook(self._reader(p)) for p in modules]
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def _check(self, optimizer: str) -> int:
        """Return the number of ranks that are one shard of the batch. Raises InputError."""
        for problem in self.config.problems(optimizer):
            raise InputError(f"agvm.{problem}")
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
        # Groups are consecutive ranks, so every group lies in one of this many.
        ranks = math.lcm(1, *(comm.group_size(norm.group) for norm in norms))
        shard = ranks_of_shard(ranks, world, accumulation, self.config.estimator)
        if comm.is_main() and norms_tie_shards(ranks, world, self.config.estimator, shard):
            logger.warning(
                "agvm: batch norms over %d ranks make the gradients that are compared depend on each other, "
                "and the variances come out too large; use a bn_size that divides half the batch "
                "(docs/agvm.md)",
                ranks,
            )
        return shard

    # What a training loop calls

    def observe(self) -> None:
        """Measure, after the backward pass of each micro-batch. All ranks call it."""
        self._update(self.estimator.after_step())
        if self._is_measured():
            self.estimator.after_micro_step()
            if self.engine.is_gradient_accumulation_boundary():
                self._update(self.estimator.after_backward())

    def scale(self) -> None:
        """Apply the factors to the next optimizer step; called before `engine.step()`."""
        self._active = self.rule.applied(self.factors) if self._is_within() else {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps. All ranks call it."""
        self._update(self.estimator.after_step())
        products = {name: list(values) for name, values in self.products.items()}
        return {"factors": dict(self.factors), "variances": dict(self.variances), "products": products}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Raises InputError, a ValueError, for a state of other modules."""
        if set(state["factors"]) != set(self.names):
            raise InputError(
                f"agvm: the checkpoint has modules {sorted(state['factors'])}, the run {self.names}"
            )
        self.factors, self.variances = dict(state["factors"]), dict(state["variances"])
        # Earlier checkpoints have none.
        self.products |= {name: Products(*values) for name, values in state.get("products", {}).items()}

    def noise_scales(self) -> dict[str, float]:
        """Return the noise scale in images of each module, of its averaged products.

        It is infinite where no signal was found; modules without a measurement are left out.
        """
        found = {name: products.variance for name, products in self.products.items()}
        return {n: noise_scale(v, self._setting.batch) for n, v in found.items() if not math.isnan(v)}

    def scalars(self) -> dict[str, float]:
        """Return factor, variance and noise scale (in images) of every module, for the log.

        Variance and noise scale are of the last measurement, `mean_noise_scale` is of the averages.
        `undefined` is the share of the measurements in which a module had no variance, and kept its factor.
        """
        applied = self.rule.applied(self.factors)
        found = {f"agvm/{name}/factor": applied[name] for name in self.names}
        for name, count in self._undefined.items():
            if count:
                found[f"agvm/{name}/undefined"] = count / self._measurements
        for name, variance in self.variances.items():
            if math.isfinite(variance):
                found[f"agvm/{name}/variance"] = variance
                if math.isfinite(scale := noise_scale(variance, self._setting.batch)):
                    found[f"agvm/{name}/noise_scale"] = scale
        for name, scale in self.noise_scales().items():
            if math.isfinite(scale):
                found[f"agvm/{name}/mean_noise_scale"] = scale
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

    def _count(self, variances: dict[str, float]) -> None:
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

    def _update(self, measured: Measured | None) -> None:
        """Move the factors towards the goals of the rule.

        A module whose variance is undefined keeps its factor: the gradient of its mask head is zero where
        half of the batch has no object. Where the rule needs the anchor's and has none, all keep theirs.
        """
        if measured is None:
            return
        variances = {name: products.variance for name, products in measured.items()}
        self._count(variances)
        keep = self.config.momentum
        defined = {name: value for name, value in variances.items() if not math.isnan(value)}
        for name in defined:
            self.products[name] = averaged(self.products[name], measured[name], keep)
        goals = self.rule.goals(Measurement(defined, self.noise_scales()), self._setting)
        if not goals:
            return
        self.variances = defined
        for name, goal in goals.items():
            self.factors[name] = keep * self.factors[name] + (1.0 - keep) * goal
