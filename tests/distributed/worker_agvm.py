"""One rank of test_agvm.py: AGVM under DeepSpeed, and a reference in plain PyTorch.

worker_agvm.py FOLDER CASES_JSON; writes FOLDER/CASE.pt: variances, factors, LRs and weights of every step.
The reference computes every shard's gradient separately, as one vector per module, and the papers' formulas.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from worker_zero import run_cases

from giantdet.config.types import AgvmConfig
from giantdet.distributed import comm
from giantdet.layers.cgbn import convert_batchnorm
from giantdet.optim import estimators
from giantdet.optim.agvm import Agvm
from giantdet.optim.param_groups import parameter_groups

MODULES = ("backbone", "neck", "head")
REFERENCE = 4  # batch of the rule noise_scale
STEPS, ROWS = 8, 5


class Toy(nn.Module):
    """The three modules of the golden traces; `wide` gives fragments of many sizes.

    `norm` adds a batch norm to the backbone.
    """

    checkpoint_blocks = False

    def __init__(self, wide: int = 1, norm: bool = False) -> None:
        super().__init__()
        self.backbone: nn.Module = nn.Linear(6, 8 * wide)
        if norm:  # without a bias, whose gradient would be rounding errors, which Adam scales up
            self.backbone = nn.Sequential(nn.Linear(6, 8 * wide, bias=False), nn.BatchNorm1d(8 * wide))
        self.neck = nn.Linear(8 * wide, 7 * wide)
        self.head = nn.Linear(7 * wide, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.head.weight.dtype)
        if self.checkpoint_blocks:
            x = checkpoint(self.body, x, use_reentrant=False)
            return self.head(x)
        return self.head(self.body(x))

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.neck(torch.tanh(self.backbone(x))))


def build(case: dict[str, Any]) -> Toy:
    torch.manual_seed(0)
    model = Toy(case.get("wide", 1), "norm_ranks" in case)
    if "golden" in case:
        stored = np.load(case["golden"])
        for name, parameter in model.named_parameters():
            parameter.data.copy_(torch.from_numpy(stored[f"init.{name}"]))
    if case.get("frozen"):
        model.neck.requires_grad_(False)
    return model


def data(case: dict[str, Any], step: int, rank: int, micro_step: int) -> tuple[Tensor, Tensor]:
    if "golden" in case:
        stored = np.load(case["golden"])
        return tuple(torch.from_numpy(stored[k][step, rank]).float() for k in ("x", "y"))  # type: ignore[return-value]
    generator = torch.Generator().manual_seed(10_000 * step + 100 * micro_step + rank)
    return torch.randn(ROWS, 6, generator=generator), torch.randn(ROWS, 3, generator=generator)


def groups_of(case: dict[str, Any], model: nn.Module) -> list[dict[str, Any]]:
    decay = case["params"].get("weight_decay", 0.0)
    groups = parameter_groups(model, decay, case["params"]["lr"])
    if "golden" in case:  # it decays biases too
        groups = [{**group, "weight_decay": decay} for group in groups]
    return groups


def weight_of(case: dict[str, Any], rank: int) -> float:
    """Return the weight of a rank's loss: 0 for a rank without objects."""
    return 0.0 if rank == case.get("without_objects") else 1.0


def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).float() - batch[1]).square().mean()


def under_deepspeed(case: dict[str, Any]) -> list[dict[str, Any]]:
    import deepspeed

    stage = case["stage"]
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": case.get("accumulation", 1),
        "gradient_clipping": case.get("clip", 0.0),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": case["optimizer"], "params": case["params"]},
        "bf16": {"enabled": case.get("precision") == "bf16"},
        "fp16": {"enabled": case.get("precision") == "fp16", "initial_scale_power": 8},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if case.get("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    elif case["optimizer"] != "SGD":
        config["optimizer"]["params"] = case["params"] | {"torch_adam": True}
    model = build(case)
    model.checkpoint_blocks = case.get("checkpoint_blocks", False)
    if "norm_ranks" in case:
        model = convert_batchnorm(model, comm.subgroup(case["norm_ranks"]))
    groups = groups_of(case, model)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    agvm = Agvm(engine, AgvmConfig.model_validate(case["agvm"]))
    records = []
    for step in range(case.get("steps", STEPS)):
        if "clip_range" in case:
            clip = case["clip"] if step in range(*case["clip_range"]) else 0.0
            engine._config.gradient_clipping = clip
            if stage > 0:
                engine.optimizer.clip_grad = clip
        for micro_step in range(case.get("accumulation", 1)):
            loss = loss_of(engine, data(case, step, comm.rank(), micro_step))
            engine.backward(loss * weight_of(case, comm.rank()))
            agvm.observe()
            agvm.scale()
            engine.step()
        if case.get("resume_after") == step:
            state = agvm.state_dict()
            agvm.close()
            agvm = Agvm(engine, AgvmConfig.model_validate(case["agvm"]))
            agvm.load_state_dict(json.loads(json.dumps(state)))
        weights = {}
        for name, parameter in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                weights[name] = parameter.detach().float().clone()
        rates = {group["name"]: group["lr"] for group in engine.basic_optimizer.param_groups}
        # state_dict completes what was deferred to the optimizer step
        records.append({**agvm.state_dict(), "weights": weights, "lr": rates})
    engine.destroy()
    return records


def by_hand(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Compute the steps in one process, in float64, for all shards."""
    settings = AgvmConfig.model_validate(case["agvm"])
    model = build(case).double()
    world, accumulation = comm.world_size(), case.get("accumulation", 1)
    groups = groups_of(case, model)
    optimizer = getattr(torch.optim, case["optimizer"])(groups, **case["params"])
    names = [n for n in MODULES if any(p.requires_grad for p in getattr(model, n).parameters())]
    factors = dict.fromkeys(names, 1.0)
    variances: dict[str, float] = {}
    signals, squares = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    tied = case.get("norm_ranks", 1)  # ranks whose images depend on each other: together one shard
    records = []
    for step in range(case.get("steps", STEPS)):
        shards: dict[str, list[Tensor]] = {name: [] for name in names}
        total = [torch.zeros_like(p) for p in model.parameters()]
        for first in range(0, world, tied):
            for micro_step in range(accumulation):
                ranks = range(first, first + tied)
                x, y = map(torch.cat, zip(*(data(case, step, r, micro_step) for r in ranks), strict=True))
                weights = torch.tensor([weight_of(case, r) for r in ranks]).repeat_interleave(ROWS)
                model.zero_grad()
                ((model(x.double()) - y.double()).square().mean(1) * weights).mean().backward()
                for name in names:
                    shards[name].append(flat(p.grad for p in getattr(model, name).parameters()))
                for sum_, p in zip(total, model.parameters(), strict=True):
                    if p.grad is not None:
                        sum_ += p.grad / (world // tied * accumulation)
        first, last = settings.start_step, settings.stop_step
        within = step >= first and (last is None or step <= last)
        new = dict(factors)
        if within and step % settings.interval == 0:
            variances = {}
            for name in names:
                gradients = torch.stack(shards[name]).view(world // tied, accumulation, -1)
                parameters = list(getattr(model, name).parameters())
                moment = flat(optimizer.state[p].get("exp_avg_sq", torch.zeros_like(p)) for p in parameters)
                signal, square = products(case, settings, gradients, moment)
                variances[name] = 1.0 - signal / square
                signals[name] = settings.momentum * signals[name] + signal
                squares[name] = settings.momentum * squares[name] + square
            low, high = settings.clamp
            for name in names:
                ratio = (variances[settings.anchor] + 1e-6) / (variances[name] + 1e-6)
                goal = 1.0 if name == settings.anchor else min(max(ratio, low), high) ** 0.5
                if settings.rule.startswith("noise_scale"):
                    goal = surge(case, settings, signals[name], squares[name])
                new[name] = settings.momentum * factors[name] + (1 - settings.momentum) * goal
        lagged = settings.estimator == "all_splits" and not preconditioned(case)
        used = applied(settings.rule, factors if lagged else new)
        factors = new
        norm = torch.stack([g.norm() for g in total]).norm()
        clip = case.get("clip", 0.0) if step in range(*case.get("clip_range", (0, 10**6))) else 0.0
        for p, gradient in zip(model.parameters(), total, strict=True):
            if p.requires_grad:
                p.grad = gradient * (min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = case["params"]["lr"] * (used[group["name"].split("/")[0]] if within else 1.0)
        optimizer.step()
        weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        records.append({"variances": dict(variances), "factors": dict(factors), "weights": weights})
    return records


def surge(case: dict[str, Any], settings: AgvmConfig, signal: float, square: float) -> float:
    """Return the ratio of the optimal LRs of the run's batch and of the reference batch, clamped."""
    batch = ROWS * comm.world_size() * case.get("accumulation", 1)
    scale = batch / 2 * (square - signal) / signal if signal > 0 else 1e12

    def optimal(size: int) -> float:
        if case["optimizer"] == "SGD":
            return 1 / (1 + scale / size)
        return 1 / ((scale / size) ** 0.5 + (size / scale) ** 0.5)

    low, high = settings.clamp
    return min(max(optimal(batch) / optimal(REFERENCE), low), high)


def applied(rule: str, factors: dict[str, float]) -> dict[str, float]:
    if rule in ("uniform", "noise_scale_uniform"):
        return dict.fromkeys(factors, float(np.prod([*factors.values()]) ** (1 / len(factors))))
    return {name: 1 / f for name, f in factors.items()} if rule == "inverse" else factors


def preconditioned(case: dict[str, Any]) -> bool:
    chosen = case["agvm"].get("preconditioned", "auto")
    return "Adam" in case["optimizer"] if chosen == "auto" else chosen


def variance(case: dict[str, Any], settings: AgvmConfig, gradients: Tensor, moment: Tensor) -> float:
    """Return 1 - signal / square of `products`."""
    signal, square = products(case, settings, gradients, moment)
    return 1.0 - signal / square


def products(
    case: dict[str, Any], settings: AgvmConfig, gradients: Tensor, moment: Tensor
) -> tuple[float, float]:
    """The products of `[shards, accumulation, n]` gradients; all_splits: from all pairs of shards."""
    world, _, size = gradients.shape
    beta2, eps = case["params"].get("betas", (0.9, 0.999))[1], case["params"].get("eps", 1e-8)
    wrong = 1.0 / world if settings.look_ahead == "released" else 1.0

    def divisor(gradient: Tensor) -> Tensor:
        if not preconditioned(case):
            return torch.ones_like(gradient)
        return (beta2 * moment + (1 - beta2) * (wrong * gradient).square()).sqrt() + eps

    if settings.estimator == "half_split":
        axis = 0 if world % 2 == 0 else 1
        one, two = (half.reshape(-1, size).mean(0) for half in gradients.chunk(2, axis))
        one, two = one / divisor(one), two / divisor(two)
        return float(one @ two), float(one.norm() * two.norm())
    shards = gradients.reshape(-1, size)
    shards = shards / divisor(shards.mean(0))
    count = len(shards)
    products = shards @ shards.T
    off_diagonal = (products.sum() - products.trace()) / (count * (count - 1))
    half = count / 2
    square = products.trace() / count / half + (half - 1) / half * off_diagonal
    return float(off_diagonal), float(square)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten().clone() for t in tensors])


def result_of(case: dict[str, Any], _: Path) -> dict[str, Any]:
    # Only the main rank's result is used.
    return {"deepspeed": under_deepspeed(case), "hand": by_hand(case) if comm.is_main() else []}


if __name__ == "__main__":
    estimators.BUCKET = 100  # several buckets even here
    run_cases(result_of)
