"""AGVM, the adaptive gradient variance modulator (Xue et al., NeurIPS 2022), at every ZeRO stage.

With a large batch the modules of a detector see gradients of very different variance: backbone and pyramid
train well where the heads diverge, or the other way round. AGVM measures each module's variance,

    Phi_i = 1 - cos(G_i1, G_i2),

G_i1 and G_i2 its mean gradients over the two halves of the global batch, and multiplies its LR by

    mu_i = sqrt(Phi_anchor / Phi_i),

smoothed over time, so that the modules' variances align with the anchor's, the backbone's. In a loop:

    agvm = Agvm(engine, AgvmConfig(enabled=True))
    ...
    engine.backward(loss)
    agvm.observe()  # measures, on every `interval`-th step
    agvm.scale()    # the LRs of the coming optimizer step, and of that one alone
    engine.step()

Gradients are read by hooks on the parameters, before DeepSpeed reduces and partitions them: one code for all
stages. All ranks call both functions. On measured steps only:

- `half_split`, the paper's estimator: exact halves. With AdamW the gradients are preconditioned as in the
  released code, g / (sqrt(b2 v + (1 - b2) g^2) + eps) with v from before the step.
- `all_splits`: the expected cosine over all splits into halves, from the squared norms of the K = ranks x
  micro-batches shards' gradients and of their mean (see `variance_of_all_splits`).

What they cost: two sums of the gradient in float32 on each rank until the end of the step (one for
half_split on an even number of ranks), and a reduction of both, 8 bytes a parameter. `all_splits` without
preconditioning keeps and sends a few floats a module, and its factors act one step later, because the mean's
norm is read in the optimizer step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from giantdet.config.types import AgvmConfig
from giantdet.distributed import comm
from giantdet.errors import InputError
from giantdet.layers.cgbn import CrossGpuBatchNorm
from giantdet.optim.fragments import Fragment, even_share, shares
from giantdet.optim.param_groups import module_of, module_of_group
from giantdet.optim.variance import (
    aligning_factors,
    noise_scale,
    variance_of_all_splits,
    variance_of_halves,
)

logger = logging.getLogger("giantdet")

BUCKET = 2**25  # elements that are reduced at a time


def norms_tie_shards(ranks: int, world: int, estimator: str) -> bool:
    """Do batch norms over `ranks` ranks at a time see images of two shards that are compared?

    Halves of the ranks are free of each other if both are made of whole groups; halves of the micro-batches
    (an odd world) always are, and single ranks never.
    """
    if estimator == "all_splits":
        return ranks > 1
    return world % 2 == 0 and (world // 2) % ranks != 0


class Agvm:
    """Observes a DeepSpeed engine's gradients and scales its learning rates; see the module's docstring.

    The engine's parameter groups carry names, `MODULE` or `MODULE/anything` (`optim/param_groups.py`).

    Raises ValueError where the groups' modules, the anchor, or ranks and micro-batches do not fit.
    """

    def __init__(self, engine: Any, config: AgvmConfig) -> None:
        self.engine, self.config = engine, config
        self.accumulation = engine.gradient_accumulation_steps()
        self.shards = comm.world_size() * self.accumulation
        trainable = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
        self.module = {p: module_of(name, config.modules) for name, p in trainable}
        self.names = sorted(set(self.module.values()))
        self.index = {name: i for i, name in enumerate(self.names)}
        self._check()
        kind = engine.basic_optimizer.__class__.__name__
        self.preconditioned = "Adam" in kind if config.preconditioned == "auto" else config.preconditioned
        self.factors = dict.fromkeys(self.names, 1.0)
        self.variances: dict[str, float] = {}
        self._device = next(iter(self.module)).device
        self._rows: list[dict[nn.Parameter, Tensor]] = [{}, {}]
        # By step, [modules, 2]: squares of the shards' gradients, square of their mean.
        self._sums: dict[int, Tensor] = {}
        self._active: dict[str, float] = {}
        self._clipping = 0.0  # of the coming step; a run may clip in some steps only
        self._hooks = [p.register_hook(self._reader(p)) for p in self.module]
        self._hooks.append(engine.basic_optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(engine.basic_optimizer.register_step_post_hook(self._after_step))

    def _check(self) -> None:
        if self.config.anchor not in self.index:
            raise InputError(
                f"agvm.anchor '{self.config.anchor}' is no module with trainable parameters: "
                f"{', '.join(self.names)}"
            )
        named = {module_of_group(group) for group in self.engine.basic_optimizer.param_groups}
        if named != set(self.names):
            raise InputError(
                f"agvm: the optimizer's groups are of the modules {sorted(named)}, the parameters of "
                f"{self.names}; name the groups as optim/param_groups.py does"
            )
        if self.config.clamp[0] > self.config.clamp[1]:
            raise InputError(f"agvm.clamp {list(self.config.clamp)}: give the lower bound first")
        if self.shards < 2:
            raise InputError(
                "agvm needs two ranks or gradient_accumulation_steps of two: one shard has no variance"
            )
        if self.config.estimator == "half_split" and comm.world_size() % 2 and self.accumulation % 2:
            raise InputError(
                f"agvm.estimator half_split cannot halve {comm.world_size()} ranks x {self.accumulation} "
                'micro-batches; take "all_splits", or an even number of one of them'
            )
        norms = [m for m in self.engine.module.modules() if isinstance(m, CrossGpuBatchNorm)]
        ranks = max((comm.group_size(norm.group) for norm in norms), default=1)
        if comm.is_main() and norms_tie_shards(ranks, comm.world_size(), self.config.estimator):
            logger.warning(
                "agvm: batch norms over %d ranks tie the gradients that are compared to one another, and the "
                "variances come out too large; take half_split, and a bn_size that divides half the batch "
                "(docs/agvm.md)",
                ranks,
            )

    # What a loop calls

    def observe(self) -> None:
        """After the backward of a micro-batch: measure, if it is the last one of a measured step."""
        self._finish()
        if not self.engine.is_gradient_accumulation_boundary() or not self._is_measured():
            return
        if self._reads_elementwise():
            self._take(self._measure_elementwise())
            self._rows = [{}, {}]
            return
        sums = self._sums_of_step()
        if self.engine.zero_optimization_stage() == 0:
            # Here the reduced gradient is whole on all ranks, and not clipped yet.
            for p, name in self.module.items():
                if p.grad is not None:
                    sums[self.index[name], 1] += p.grad.double().square().sum() / comm.world_size()

    def scale(self) -> None:
        """Before `engine.step()`: let the factors act on the coming optimizer step."""
        self._active = self.factors if self._is_within() else {}
        self._clipping = self.engine.gradient_clipping()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep. All ranks call it."""
        self._finish()
        return {"factors": dict(self.factors), "variances": dict(self.variances)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state is of other modules."""
        if set(state["factors"]) != set(self.names):
            raise InputError(
                f"agvm: the checkpoint has modules {sorted(state['factors'])}, the run {self.names}"
            )
        self.factors, self.variances = dict(state["factors"]), dict(state["variances"])

    def scalars(self) -> dict[str, float]:
        """For the log: factor, variance and noise scale (in images) of every module."""
        found = {f"agvm/{name}/factor": self.factors[name] for name in self.names}
        batch = self.engine.train_batch_size()
        for name, variance in self.variances.items():
            if math.isfinite(variance):
                found[f"agvm/{name}/variance"] = variance
                if math.isfinite(scale := noise_scale(variance, batch)):
                    found[f"agvm/{name}/noise_scale"] = scale
        return found

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    # When

    def _is_within(self) -> bool:
        first, last = self.config.start_step, self.config.stop_step
        assert first != "auto", "resolve the run first"
        return first <= self.engine.global_steps and (last is None or self.engine.global_steps <= last)

    def _is_measured(self) -> bool:
        return self._is_within() and self.engine.global_steps % self.config.interval == 0

    def _reads_elementwise(self) -> bool:
        return self.config.estimator == "half_split" or self.preconditioned

    # Reading the gradients of this rank

    def _reader(self, p: nn.Parameter) -> Any:
        def read(gradient: Tensor) -> None:
            if not self._is_measured():
                return
            if not self._reads_elementwise():
                norm = torch.linalg.vector_norm(gradient, dtype=torch.float32).double()
                self._sums_of_step()[self.index[self.module[p]], 0] += norm.square()
                return
            # A copy: DeepSpeed reduces this very tensor in place.
            gradient = gradient.detach().flatten().to(torch.float32, copy=True)
            if self.config.estimator == "half_split":
                self._add(self._rows[self._half()], p, gradient)
            else:
                self._add(self._rows[0], p, gradient)
                self._add(self._rows[1], p, gradient.square())

        return read

    def _half(self) -> int:
        """Of the ranks; of the micro-batches where the number of ranks is odd."""
        if comm.world_size() % 2 == 0:
            return int(comm.rank() >= comm.world_size() // 2)
        return int(self.engine.micro_steps % self.accumulation >= self.accumulation // 2)

    @staticmethod
    def _add(row: dict[nn.Parameter, Tensor], p: nn.Parameter, gradient: Tensor) -> None:
        row[p] = row[p] + gradient if p in row else gradient

    def _sums_of_step(self) -> Tensor:
        step = self.engine.global_steps
        if step not in self._sums:
            self._sums[step] = self._zeros(len(self.names), 2)
        return self._sums[step]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self._device)

    # The elementwise estimators: complete before the optimizer step

    def _measure_elementwise(self) -> dict[str, float]:
        """Reduce both rows over the ranks, in buckets; each rank takes the products of its fragments."""
        fragments = shares(self.engine) if self.preconditioned else None
        sums = self._zeros(len(self.names), 3)
        for bucket in self._buckets():
            rows = torch.stack([torch.cat([self._row(half, p) for p in bucket]) for half in (0, 1)])
            comm.sum_over_ranks_(rows)
            sizes = [_numel(p) for p in bucket]
            for p, part in zip(bucket, rows.split(sizes, 1), strict=True):
                fragment = None if fragments is None else fragments.get(p)
                if fragment is None and fragments is not None:
                    continue  # other ranks have all of it
                first, last = even_share(_numel(p)) if fragment is None else fragment[:2]
                both = part[:, first:last] / self._loss_scale()
                sums[self.index[self.module[p]]] += self._products(both, fragment)
        comm.sum_over_ranks_(sums)
        values = sums.tolist()
        found = {}
        for name, i in self.index.items():
            first, second, third = values[i]
            if self.config.estimator == "half_split":
                found[name] = variance_of_halves(first, second, third)
            else:
                found[name] = variance_of_all_splits(first, second, self.shards)
        return found

    def _buckets(self) -> Iterator[list[nn.Parameter]]:
        """Parameters in the model's order: the same on every rank, whatever got a gradient there."""
        bucket: list[nn.Parameter] = []
        for p in self.module:
            if bucket and sum(map(_numel, bucket)) + _numel(p) > BUCKET:
                yield bucket
                bucket = []
            bucket.append(p)
        yield bucket

    def _row(self, half: int, p: nn.Parameter) -> Tensor:
        found = self._rows[half].pop(p, None)
        return torch.zeros(_numel(p), device=self._device) if found is None else found

    def _loss_scale(self) -> float:
        """fp16 multiplies the loss; bf16 and float32 do not."""
        return float(getattr(self.engine.optimizer, "loss_scale", 1.0) or 1.0)

    def _products(self, rows: Tensor, fragment: Fragment | None) -> Tensor:
        """`[3]`: of half_split dot product and squares, of all_splits squares of shards and of the mean."""
        # DeepSpeed divides the loss by the number of micro-batches.
        if self.config.estimator == "half_split":
            one, two = (self._precondition(g, g, fragment) for g in rows * (2.0 / comm.world_size()))
            return torch.stack([one @ two, one @ one, two @ two]).double()
        mean = rows[0] / comm.world_size()
        squares = rows[1] * self.accumulation**2
        scale = self._precondition(torch.ones_like(mean), mean, fragment)
        shards = (squares * scale.square()).sum()
        return torch.stack([shards, (mean * scale).square().sum(), torch.zeros_like(shards)]).double()

    def _precondition(self, value: Tensor, gradient: Tensor, fragment: Fragment | None) -> Tensor:
        """value / (sqrt(b2 v + (1 - b2) gradient^2) + eps): what Adam would divide by after this gradient."""
        if fragment is None:
            return value
        beta2, eps = fragment.group["betas"][1], fragment.group["eps"]
        if self.config.look_ahead == "released":  # which had divided the gradient by the number of ranks
            gradient = gradient / comm.world_size()
        moment = (1.0 - beta2) * gradient.square()
        saved = fragment.state(self.engine.basic_optimizer)[0].get("exp_avg_sq")  # None before the first step
        if saved is not None:
            moment = moment + beta2 * saved.to(gradient.device, torch.float32)
        return value / (moment.sqrt() + eps)

    # The norms' estimator: complete after the optimizer step

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        """Read the reduced gradient's norms, and scale the LRs. Runs once a group at stages 1 to 3."""
        sums = self._sums.get(self.engine.global_steps)
        staged = self.engine.zero_optimization_stage() > 0
        for group in optimizer.param_groups:
            name = module_of_group(group)
            for p in group["params"]:
                if sums is not None and staged and p.grad is not None:
                    sums[self.index[name], 1] += p.grad.double().square().sum().to(sums.device)
            group["_agvm_lr"] = group["lr"]
            group["lr"] = group["lr"] * self._active.get(name, 1.0)

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group.pop("_agvm_lr")

    def _finish(self) -> None:
        """Complete the measurement that waited for the last optimizer step. All ranks call it."""
        for step in [step for step in self._sums if step < self.engine.global_steps]:
            sums = self._sums.pop(step)
            comm.sum_over_ranks_(sums)
            squares = (self.accumulation / self._loss_scale()) ** 2
            clipped = self._clip_coefficient() ** 2 if self.engine.zero_optimization_stage() > 0 else 1.0
            values = (sums * sums.new_tensor([squares, 1.0 / clipped])).tolist()
            if self.engine.was_step_applied():
                pairs = dict(zip(self.names, values, strict=True))
                self._take({n: variance_of_all_splits(s, m, self.shards) for n, (s, m) in pairs.items()})

    def _clip_coefficient(self) -> float:
        """By which DeepSpeed has multiplied the gradient of the last step."""
        clip, norm = self._clipping, self.engine.get_global_grad_norm()
        return min(1.0, clip / (float(norm) + 1e-6)) if clip and norm is not None else 1.0

    def _take(self, variances: dict[str, float]) -> None:
        if any(map(math.isnan, variances.values())):
            return  # of a step that is left out, on all ranks
        self.variances = variances
        keep = self.config.momentum
        for name, factor in aligning_factors(variances, self.config.anchor, self.config.clamp).items():
            self.factors[name] = keep * self.factors[name] + (1.0 - keep) * factor


def _numel(p: nn.Parameter) -> int:
    return int(getattr(p, "ds_numel", p.numel()))
