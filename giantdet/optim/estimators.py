"""AGVM's estimators of gradient variance: what each reads of a training step, and when its answer is known.

The variance of a module is Phi = 1 - cos(G_1, G_2), with G_1 and G_2 its mean gradients over two halves of
the global batch. The shards of a batch are its K = ranks x micro-batches parts.

- `HalfSplit`, the paper's estimator: two fixed halves.
- `AllSplits`: 1 - E[G_1 G_2] / E|G_1|^2, with expectations over all splits of the shards into halves, from
  the squared norms of the shards' gradients and of their mean (`variance_of_all_splits`). This is not 1 minus
  the mean cosine of the splits, but close to it. Elementwise, to precondition the gradients.
- `AllSplitsOfNorms`: the same without preconditioning, for which norms are enough.

Where batch norms make the gradients of a group of ranks depend on each other, `all_splits` takes the groups,
not single ranks, as shards: it averages the gradient over each group in every micro-step.

Preconditioned gradients are g / (sqrt(b2 v + (1 - b2) g^2) + eps), as in the released code: what Adam would
apply, with the second moment v from before the step.

Gradients are read by hooks on the parameters, before DeepSpeed reduces and partitions them, so the same code
serves all ZeRO stages. The first two estimators keep two sums of the gradient in float32 on each rank until
the end of the step (`HalfSplit` on an even number of ranks: one) and all-reduce both, 8 bytes per parameter.
`AllSplitsOfNorms` keeps and sends a few floats per module, but its answer comes one step later, because the
norm of the mean gradient is read in the optimizer step. Shards of several ranks add a float32 copy of the
gradient on each rank, and an all-reduce of it inside the group, in each micro-step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from giantdet.config.types import AgvmConfig
from giantdet.distributed import comm
from giantdet.distributed.engine import Engine
from giantdet.optim.fragments import Fragment, even_share, shares, whole_shape
from giantdet.optim.param_groups import module_of_group
from giantdet.optim.variance import Products, products_of_all_splits, products_of_halves

BUCKET = 2**25  # elements per all-reduce

Measured = dict[str, Products]
"""By module. The variance of a module is NaN where a half, or every shard, has no gradient."""


class VarianceEstimator(Protocol):
    """Estimates each module's gradient variance in the steps that `Agvm` measures.

    All ranks call all methods together, except `read`.
    """

    def read(self, p: nn.Parameter, gradient: Tensor) -> None:
        """Read this rank's gradient of a parameter in one micro-step of a measured step."""

    def after_micro_step(self) -> None:
        """Complete the backward pass of a micro-step of a measured step."""

    def after_backward(self) -> Measured | None:
        """Complete the last micro-step of a measured step; return the products if they are known now.

        None also stands for a step with a gradient that is not finite, which all ranks skip.
        """

    def before_step(self, groups: Iterable[dict[str, Any]]) -> None:
        """Read the gradients in an optimizer step. At stages 1 to 3 it is called once for each group."""

    def after_step(self) -> Measured | None:
        """Return the products that were waiting for an optimizer step, if that step has been applied."""


def estimator_of(
    engine: Engine, modules: dict[nn.Parameter, str], config: AgvmConfig, ranks: int = 1
) -> VarianceEstimator:
    """Return the estimator that a configuration without "auto" asks for.

    modules: by parameter. ranks: consecutive ranks that are one shard of all_splits.
    """
    if config.estimator == "half_split":
        return HalfSplit(engine, modules, config)
    if config.preconditioned:
        return AllSplits(engine, modules, config, ranks)
    return AllSplitsOfNorms(engine, modules, ranks)


def shards_of(engine: Engine, ranks: int = 1) -> int:
    """Return the number of parts of the global batch, of `ranks` ranks each, that have their own gradient."""
    return comm.world_size() // ranks * engine.gradient_accumulation_steps()


class _OfModules:
    """The engine, its trainable parameters by module, the order of modules in tensors, and the shards."""

    def __init__(self, engine: Engine, modules: dict[nn.Parameter, str], ranks: int = 1) -> None:
        self.engine, self.modules = engine, modules
        self.names = sorted(set(modules.values()))
        self.index = {name: i for i, name in enumerate(self.names)}
        self.accumulation = engine.gradient_accumulation_steps()
        self.device = next(iter(modules)).device
        self.ranks, self.shards = ranks, shards_of(engine, ranks)
        self.group = comm.subgroup(ranks)
        self._micro_step: dict[nn.Parameter, Tensor] = {}  # gradients, where a shard has several ranks

    def zeros(self, columns: int) -> Tensor:
        return torch.zeros(len(self.names), columns, dtype=torch.float64, device=self.device)

    def by_module(self, sums: Tensor, products: Callable[[list[float]], Products]) -> Measured | None:
        """Return `products` of each module's row of `sums`; None if one is not finite: steps to skip."""
        rows = sums.tolist()
        if not all(map(math.isfinite, (value for row in rows for value in row))):
            return None
        return {name: products(row) for name, row in zip(self.names, rows, strict=True)}

    def loss_scale(self) -> float:
        """Return the factor that fp16 multiplies the loss by; 1 in bf16 and float32."""
        return float(getattr(self.engine.optimizer, "loss_scale", 1.0) or 1.0)

    def copy(self, gradient: Tensor) -> Tensor:
        """Return a flat float32 copy, unscaled: DeepSpeed reduces the gradient that a hook gets in place."""
        copy, scale = gradient.detach().flatten().to(torch.float32, copy=True), self.loss_scale()
        return copy if scale == 1.0 else copy.div_(scale)

    def shard_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter's flat gradient of this micro-step, averaged over the ranks of the shard.

        All ranks must use it up: it reduces inside the group, bucket by bucket.
        """
        for bucket in self.buckets():
            flat = torch.cat([self.take(self._micro_step, p) for p in bucket])
            comm.all_reduce(flat, self.group)
            yield from zip(bucket, torch.split(flat / self.ranks, list(map(_numel, bucket))), strict=True)

    def buckets(self) -> Iterator[list[nn.Parameter]]:
        """Yield the parameters in the model's order: the same on all ranks, whichever got gradients."""
        bucket: list[nn.Parameter] = []
        for p in self.modules:
            if bucket and sum(map(_numel, bucket)) + _numel(p) > BUCKET:
                yield bucket
                bucket = []
            bucket.append(p)
        yield bucket

    def take(self, gradients: dict[nn.Parameter, Tensor], p: nn.Parameter) -> Tensor:
        """Remove and return a parameter's gradient; zeros if this rank has none."""
        found = gradients.pop(p, None)
        return torch.zeros(_numel(p), device=self.device) if found is None else found


class _Elementwise(_OfModules):
    """Sums two rows of gradients over the ranks, each rank taking products of its share of the elements.

    Complete before the optimizer step.
    """

    def __init__(
        self, engine: Engine, modules: dict[nn.Parameter, str], config: AgvmConfig, ranks: int = 1
    ) -> None:
        super().__init__(engine, modules, ranks)
        self.preconditioned, self.look_ahead = bool(config.preconditioned), config.look_ahead
        self._rows: list[dict[nn.Parameter, Tensor]] = [{}, {}]

    def add(self, row: int, p: nn.Parameter, gradient: Tensor) -> None:
        """Add the gradient of a micro-step to a row."""
        _add(self._rows[row], p, gradient)

    def sums(self, rows: Tensor, fragment: Fragment | None) -> Tensor:
        """Return the three sums that `products` needs, from a part of both rows, summed over the ranks."""
        raise NotImplementedError

    def products(self, first: float, second: float, third: float) -> Products:
        """Return a module's products from its `sums`."""
        raise NotImplementedError

    def after_micro_step(self) -> None:
        pass

    def after_backward(self) -> Measured | None:
        fragments = shares(self.engine) if self.preconditioned else None
        sums = self.zeros(3)
        for bucket in self.buckets():
            rows = torch.stack([torch.cat([self.take(row, p) for p in bucket]) for row in self._rows])
            comm.sum_over_ranks_(rows)
            sizes = [_numel(p) for p in bucket]
            for p, part in zip(bucket, torch.split(rows, sizes, 1), strict=True):
                fragment = None if fragments is None else fragments.get(p)
                if fragment is None and fragments is not None:
                    continue  # other ranks have all of it
                first, last = even_share(_numel(p)) if fragment is None else fragment[:2]
                sums[self.index[self.modules[p]]] += self.sums(part[:, first:last], fragment)
        comm.sum_over_ranks_(sums)
        self._rows = [{}, {}]
        return self.by_module(sums, lambda row: self.products(*row))

    def before_step(self, groups: Iterable[dict[str, Any]]) -> None:
        pass

    def after_step(self) -> Measured | None:
        return None

    def precondition(self, value: Tensor, gradient: Tensor, fragment: Fragment | None) -> Tensor:
        """Return value / (sqrt(b2 v + (1 - b2) gradient^2) + eps), or `value` without a fragment."""
        if fragment is None:
            return value
        beta2, eps = fragment.group["betas"][1], fragment.group["eps"]
        if self.look_ahead == "released":  # the authors' code divides the gradient by the number of ranks
            gradient = gradient / comm.world_size()
        moment = (1.0 - beta2) * gradient.square()
        saved = fragment.state(self.engine.basic_optimizer)[0].get("exp_avg_sq")  # None before the first step
        if saved is not None:
            moment = moment + beta2 * saved.to(gradient.device, torch.float32)
        scaled: Tensor = value / (moment.sqrt() + eps)
        return scaled


class HalfSplit(_Elementwise):
    """1 - cos of the mean gradients of the two halves of the batch, one row for each half.

    The halves are those of the ranks, or of the micro-steps where the number of ranks is odd.
    """

    def read(self, p: nn.Parameter, gradient: Tensor) -> None:
        self.add(self._half(), p, self.copy(gradient))

    def _half(self) -> int:
        if comm.world_size() % 2 == 0:
            return int(comm.rank() >= comm.world_size() // 2)
        return int(self.engine.micro_steps % self.accumulation >= self.accumulation // 2)

    def sums(self, rows: Tensor, fragment: Fragment | None) -> Tensor:
        """Return the dot product of the halves and both squared norms."""
        # DeepSpeed divides the loss by the number of micro-steps.
        one, two = (self.precondition(g, g, fragment) for g in rows * (2.0 / comm.world_size()))
        return torch.stack([one @ two, one @ one, two @ two]).double()

    def products(self, first: float, second: float, third: float) -> Products:
        return products_of_halves(first, second, third)


class AllSplits(_Elementwise):
    """The ratio of expectations over all splits, of preconditioned gradients: rows of sums and of squares."""

    def read(self, p: nn.Parameter, gradient: Tensor) -> None:
        gradient = self.copy(gradient)
        self.add(0, p, gradient)
        if self.group is None:
            self.add(1, p, gradient.square())
        else:
            _add(self._micro_step, p, gradient)

    def after_micro_step(self) -> None:
        if self.group is not None:
            for p, gradient in self.shard_gradients():
                self.add(1, p, gradient.square() / self.ranks)  # each of the shard's ranks adds it

    def sums(self, rows: Tensor, fragment: Fragment | None) -> Tensor:
        """Return the sum of the shards' squared norms, the squared norm of their mean, and 0."""
        mean = rows[0] / comm.world_size()
        squares = rows[1] * self.accumulation**2  # DeepSpeed divides the loss by the number of micro-steps
        scale = self.precondition(torch.ones_like(mean), mean, fragment)
        shards = (squares * scale.square()).sum()
        return torch.stack([shards, (mean * scale).square().sum(), torch.zeros_like(shards)]).double()

    def products(self, first: float, second: float, third: float) -> Products:
        return products_of_all_splits(first, second, self.shards)


class AllSplitsOfNorms(_OfModules):
    """The ratio of expectations over all splits from norms alone; complete after the optimizer step."""

    def __init__(self, engine: Engine, modules: dict[nn.Parameter, str], ranks: int = 1) -> None:
        super().__init__(engine, modules, ranks)
        # By step, [modules, 2]: squares of the shards' gradients, square of their mean. Two steps at a time:
        # the next step's first gradients are read before this step's sums are complete.
        self._sums: dict[int, Tensor] = {}
        self._clipping = 0.0  # of the step that was measured last: it may differ once its sums are complete

    def read(self, p: nn.Parameter, gradient: Tensor) -> None:
        if self.group is None:
            self._add_square(p, gradient, self.loss_scale())
        else:
            _add(self._micro_step, p, self.copy(gradient))

    def after_micro_step(self) -> None:
        if self.group is not None:
            for p, gradient in self.shard_gradients():
                self._add_square(p, gradient)

    def after_backward(self) -> Measured | None:
        sums = self._sums_of_step()
        self._clipping = self.engine.gradient_clipping()
        if self.engine.zero_optimization_stage() == 0:
            # The reduced gradient is complete on all ranks here, and not clipped yet.
            for p, name in self.modules.items():
                if p.grad is not None:
                    sums[self.index[name], 1] += p.grad.double().square().sum() / comm.world_size()
        return None

    def before_step(self, groups: Iterable[dict[str, Any]]) -> None:
        sums = self._sums.get(self.engine.global_steps)
        if sums is None or self.engine.zero_optimization_stage() == 0:
            return
        for group in groups:
            row = self.index[module_of_group(group)]
            for p in group["params"]:
                if p.grad is not None:
                    sums[row, 1] += p.grad.double().square().sum().to(sums.device)

    def after_step(self) -> Measured | None:
        found = None
        for step in [step for step in self._sums if step < self.engine.global_steps]:
            sums = self._sums.pop(step)
            comm.sum_over_ranks_(sums)
            # Each of a shard's ranks has added the same square.
            squares = self.accumulation**2 / self.ranks
            clipped = self._clip_coefficient() ** 2 if self.engine.zero_optimization_stage() > 0 else 1.0
            sums = sums * sums.new_tensor([squares, 1.0 / clipped])
            if self.engine.was_step_applied():
                found = self.by_module(sums, self._products)
        return found

    def _products(self, row: list[float]) -> Products:
        return products_of_all_splits(row[0], row[1], self.shards)

    def _add_square(self, p: nn.Parameter, gradient: Tensor, scale: float = 1.0) -> None:
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32).double() / scale
        self._sums_of_step()[self.index[self.modules[p]], 0] += norm.square()

    def _sums_of_step(self) -> Tensor:
        step = self.engine.global_steps
        if step not in self._sums:
            self._sums[step] = self.zeros(2)
        return self._sums[step]

    def _clip_coefficient(self) -> float:
        """Return what DeepSpeed has multiplied the gradient of the last step by."""
        clip, norm = self._clipping, self.engine.get_global_grad_norm()
        return min(1.0, clip / (float(norm) + 1e-6)) if clip and norm is not None else 1.0


def _add(gradients: dict[nn.Parameter, Tensor], p: nn.Parameter, gradient: Tensor) -> None:
    gradients[p] = gradients[p] + gradient if p in gradients else gradient


def _numel(p: nn.Parameter) -> int:
    return whole_shape(p).numel()
