"""One rank of test_optim.py: a few steps under ZeRO, and on rank 0 in plain PyTorch.

worker_optim.py FOLDER CASES_JSON; writes FOLDER/CASE.pt with LRs by step, weights and their averages, and
FOLDER/CASE with checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import timm.optim
import torch
from worker_zero import build, loss_of, make_batch, mean_loss, run_cases, run_of

from giantdet.checkpoint.saver import Checkpoints
from giantdet.checkpoint.state import local_tensors
from giantdet.config.load import RunConfig
from giantdet.config.types import TrainConfig
from giantdet.distributed import comm
from giantdet.engine import zero
from giantdet.engine.train import clipping_at
from giantdet.optim.ema import WeightEma

STEPS = 3
AP = [0.1, 0.3, 0.2]  # as if the model had been evaluated after each step
DECAY = 0.3  # below (1 + n) / (10 + n) from the third step on: both regimes are covered


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().float().clone()
    return found


def with_zero(run: RunConfig, folder: Path, steps: int) -> dict[str, Any]:
    engine = zero.initialize(build(run), run)
    engine.train()
    ema = WeightEma(engine.module, DECAY)
    saves = run.deepspeed["optimizer"]["type"] != "AdamW" or "bf16" in run.deepspeed
    checkpoints = Checkpoints(engine, folder, TrainConfig(keep=1, async_save=True), ema=ema)
    lrs, betas = [], []
    for step in range(steps):
        zero.set_gradient_clipping(engine, clipping_at(step, run))
        lrs.append(zero.learning_rates(engine))
        betas.append([group.get("betas") for group in engine.basic_optimizer.param_groups])
        engine.backward(loss_of(engine(make_batch(step, 0, comm.rank()))))
        engine.step()
        ema.update()
        if saves:
            checkpoints.save(step + 1, AP[step])
    checkpoints.close()
    before = local_tensors(engine, ema, copy=True)[0]
    found = {"lrs": lrs, "betas": betas, "parameters": weights(engine.module)}
    found["shapes"] = sorted(tuple(p.shape) for g in engine.basic_optimizer.param_groups for p in g["params"])
    with ema.applied():
        found["averages"] = weights(engine.module)
        engine(make_batch(9, 0, comm.rank()))  # the model runs with the averages, at ZeRO-3 too
    found["restored"] = weights(engine.module)
    if saves:
        found["resumed"] = go_back(engine, checkpoints, ema, before)
    engine.destroy()
    return found


def go_back(
    engine: Any, checkpoints: Checkpoints, ema: WeightEma, before: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Take a step, load the last checkpoint, and return what differs from before."""
    counted = engine.global_steps, engine.global_samples, ema.steps, zero.learning_rates(engine)
    engine.backward(loss_of(engine(make_batch(9, 0, comm.rank()))))
    engine.step()
    ema.update()
    moved = local_tensors(engine, ema, copy=True)[0]
    assert checkpoints.resume() == engine.global_steps
    after = local_tensors(engine, ema)[0]
    assert counted == (engine.global_steps, engine.global_samples, ema.steps, zero.learning_rates(engine))
    return {
        "kinds": {name.split("/")[0] for name in before},
        "different": [name for name in before if not torch.equal(before[name], after[name])],
        "moved": {name.split("/")[0] for name in before if not torch.equal(before[name], moved[name])},
    }


def plain_optimizer(run: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    params = {k: v for k, v in run.deepspeed["optimizer"]["params"].items() if k != "torch_adam"}
    name = run.deepspeed["optimizer"]["type"]
    if name == "Lamb":
        params["max_grad_norm"] = None
    library: Any = torch.optim if hasattr(torch.optim, name) and name != "Muon" else timm.optim
    return getattr(library, name)(groups, **params)  # type: ignore[no-any-return]


def by_hand(run: RunConfig, steps: int) -> dict[str, Any]:
    """Compute in one process, without DeepSpeed, the steps of all ranks."""
    model = build(run).train()
    optimizer = plain_optimizer(run, zero.groups_of(model, run))
    averages = weights(model)
    for step in range(steps):
        mean_loss(model, [make_batch(step, 0, rank) for rank in range(comm.world_size())], False).backward()
        if limit := clipping_at(step, run):
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(DECAY, (2 + step) / (11 + step))
        for name, weight in weights(model).items():
            averages[name] = decay * averages[name] + (1 - decay) * weight
    return {"parameters": weights(model), "averages": averages}


def result_of(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    by_itself, steps = case.pop("by_hand", False), case.pop("steps", STEPS)
    run = run_of(case, folder.parent)
    if by_itself:
        return by_hand(run, steps) if comm.is_main() else {}  # only the main rank's result is used
    return with_zero(run, folder, steps)


if __name__ == "__main__":
    run_cases(result_of)
