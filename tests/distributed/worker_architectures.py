"""One rank of test_zero_every_architecture.py: each architecture under ZeRO; on rank 0 the reference.

worker_architectures.py FOLDER CASES_JSON; a case is {"kind", "data", "by_hand", changes of the run by path}.
Writes FOLDER/CASE.pt with losses, weights, and the variances and factors that AGVM measures but does not
apply, so that one run serves both comparisons. In every second step the images of odd ranks have no objects
and no labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import worker_agvm
from tiny import tiny_run
from torch import Tensor
from worker_zero import run_cases

from giantdet.architectures import Architecture, build_model, total_loss
from giantdet.config.load import parse_run
from giantdet.config.resolve import resolve
from giantdet.config.resolved import ResolvedRun
from giantdet.config.types import AgvmConfig
from giantdet.data.dataset import Dataset, open_dataset
from giantdet.data.loader import train_loader
from giantdet.distributed import comm
from giantdet.engine import zero
from giantdet.optim.agvm import Agvm
from giantdet.optim.param_groups import parameter_groups
from giantdet.optim.variance import aligning_factors
from giantdet.structures import IGNORE, Batch

STEPS = 3
# Far above rounding noise, which AdamW would otherwise amplify to steps as large as the LR.
PARAMS = {"lr": 0.002, "weight_decay": 0.05, "eps": 1e-4}
AGVM = AgvmConfig(enabled=True, interval=1, start_step=0, momentum=0.5, preconditioned=True)


def run_of(case: dict[str, Any]) -> tuple[ResolvedRun, Dataset]:
    """A resolved run of one architecture, and its training set."""
    changes = {key: value for key, value in case.items() if key not in ("kind", "data", "by_hand")}
    raw = tiny_run(Path(case["data"]), Path(case["data"]), case["kind"], **changes)
    raw["optimizer"] = {"type": "AdamW", "params": PARAMS}
    run = parse_run(raw)
    assert run.giantdet.data.train is not None
    dataset = open_dataset(run.giantdet.data.train)
    return resolve(run, comm.world_size(), len(dataset), dataset.classes, has_gpu=False), dataset


def batches(run: ResolvedRun, dataset: Dataset, rank: int, targets: frozenset[str]) -> Iterator[Batch]:
    """The batches of one rank; every second one of odd ranks has no targets."""
    world = comm.world_size()
    loader = train_loader(dataset, run.giantdet.data, run.batch.micro, rank, world, seed=5, targets=targets)
    for step, batch in enumerate(loader):
        yield without_targets(batch) if rank % 2 and step % 2 else batch


def without_targets(batch: Batch) -> Batch:
    """The batch without objects and labelled pixels."""
    targets = batch.targets
    nothing = targets._replace(
        valid_BM=torch.zeros_like(targets.valid_BM),
        semantic_BHW=torch.full_like(targets.semantic_BHW, IGNORE),
    )
    return batch._replace(targets=nothing)


def build(run: ResolvedRun) -> Architecture:
    """The model, initialised with the run's seed."""
    torch.manual_seed(0)
    return build_model(run.giantdet.model, run.giantdet.data.size, run.giantdet.norm, run.batch.micro)


def with_zero(run: ResolvedRun, dataset: Dataset) -> dict[str, Any]:
    """Train all ranks under DeepSpeed."""
    import deepspeed

    model = build(run)
    engine = zero.initialize(model, run)
    agvm = Agvm(engine, AGVM)
    engine.train()
    losses, measured = [], []
    stream = batches(run, dataset, comm.rank(), model.targets)
    for _ in range(STEPS):
        batch = next(stream)
        loss = total_loss(model.losses(engine(batch), batch))
        engine.backward(loss)
        agvm.observe()
        engine.step()
        losses.append(comm.mean_over_ranks([float(loss)])[0])
        measured.append(agvm.state_dict())
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().float().clone()
    engine.destroy()
    return {"losses": losses, "measured": measured, "weights": weights}


def by_hand(run: ResolvedRun, dataset: Dataset) -> dict[str, Any]:
    """The same steps in one process, and the variances by the formulas of worker_agvm.py."""
    model, world = build(run).train(), comm.world_size()
    groups = parameter_groups(model, PARAMS["weight_decay"], PARAMS["lr"])
    optimizer = torch.optim.AdamW(groups, eps=PARAMS["eps"])
    case = {"optimizer": "AdamW", "params": PARAMS, "agvm": {"preconditioned": True}}
    modules = {
        name: [p for p in child.parameters() if p.requires_grad] for name, child in model.named_children()
    }
    modules = {name: parameters for name, parameters in modules.items() if parameters}
    streams = [batches(run, dataset, rank, model.targets) for rank in range(world)]
    factors = dict.fromkeys(modules, 1.0)
    # Running statistics and RetinaNet's normalizer are local to each rank.
    buffers = [{n: b.clone() for n, b in model.named_buffers()} for _ in range(world)]
    losses, measured = [], []
    for _ in range(STEPS):
        shards: dict[str, list[Tensor]] = {name: [] for name in modules}
        total = {p: torch.zeros_like(p) for parameters in modules.values() for p in parameters}
        losses.append(0.0)
        for stream, own in zip(streams, buffers, strict=True):
            batch = next(stream)
            model.zero_grad()
            for n, buffer in model.named_buffers():
                buffer.copy_(own[n])
            loss = total_loss(model.losses(model(batch), batch))
            loss.backward()  # type: ignore[no-untyped-call]
            losses[-1] += float(loss) / world
            own |= {n: buffer.clone() for n, buffer in model.named_buffers()}
            for name, parameters in modules.items():
                shards[name].append(worker_agvm.flat(p.grad for p in parameters))
            for p, sum_ in total.items():
                assert p.grad is not None
                sum_ += p.grad / world
        variances = {}
        for name, parameters in modules.items():
            moment = worker_agvm.flat(
                optimizer.state[p].get("exp_avg_sq", torch.zeros_like(p)) for p in parameters
            )
            gradients = torch.stack(shards[name]).view(world, 1, -1)
            if gradients.any(-1).all():  # otherwise there is no angle between the halves
                variances[name] = worker_agvm.variance(case, AGVM, gradients, moment)
        if AGVM.anchor in variances:
            for name, goal in aligning_factors(variances, AGVM.anchor, AGVM.clamp).items():
                factors[name] = AGVM.momentum * factors[name] + (1 - AGVM.momentum) * goal
            measured.append({"variances": variances, "factors": dict(factors)})
        else:
            measured.append(measured[-1])
        for p, sum_ in total.items():
            p.grad = sum_
        optimizer.step()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"losses": losses, "measured": measured, "weights": weights}


def result_of(case: dict[str, Any], _: Path) -> dict[str, Any]:
    run, dataset = run_of(case)
    if case.get("by_hand"):
        return by_hand(run, dataset) if comm.is_main() else {}  # only the main rank's result is used
    return with_zero(run, dataset)


if __name__ == "__main__":
    run_cases(result_of)
