"""One rank of test_muon.py: steps of DeepSpeedMuon, and on rank 0 steps of torch.optim's Muon and AdamW.

worker_muon.py FOLDER CASES_JSON; writes FOLDER/CASE.pt with losses and weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.optim._muon
from deepspeed.runtime.zero.muon import original_muon
from torch import Tensor, nn
from worker_optim import go_back, weights
from worker_zero import build, loss_of, make_batch, mean_loss, run_cases, run_of

from giantdet.checkpoint.saver import Checkpoints
from giantdet.checkpoint.state import local_tensors
from giantdet.config.load import RunConfig
from giantdet.config.types import TrainConfig
from giantdet.distributed import comm
from giantdet.engine import zero
from giantdet.optim.ema import WeightEma


def _float32_iterations(
    gradient: Tensor, factors: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    a, b, c = factors
    x = gradient.T if gradient.size(0) > gradient.size(1) else gradient
    x = x / (x.norm() + eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if gradient.size(0) > gradient.size(1) else x


@contextmanager
def in_float32() -> Iterator[None]:
    """Make both libraries orthogonalise in float32: rounding to 16 bits would hide a wrong step."""
    with (
        patch.object(original_muon, "ns_compute_dtype", lambda *_: torch.float32),
        patch.object(torch.optim._muon, "_zeropower_via_newtonschulz", _float32_iterations),
    ):
        yield


def with_zero(run: RunConfig, folder: Path, steps: int, source: str | None, in_parts: bool) -> dict[str, Any]:
    """Train from the start, or for one step from the last checkpoint of the case `source`.

    in_parts: build the model weight by weight, as a run at ZeRO-3 does.
    """
    engine = zero.initialize(zero.build(run, 2) if in_parts else build(run), run)
    engine.train()
    ema = WeightEma(engine.module, 0.5)
    checkpoints = Checkpoints(
        engine, folder if source is None else folder.parent / source, TrainConfig(keep=1), ema=ema
    )
    first = 0 if source is None else checkpoints.resume()
    losses = []
    for step in range(first, steps):
        for micro_step in range(engine.gradient_accumulation_steps()):
            loss = loss_of(engine(make_batch(step, micro_step, comm.rank())))
            engine.backward(loss)
            engine.step()
            losses.append(comm.mean_over_ranks([float(loss)])[0])
        ema.update()
    found: dict[str, Any] = {"losses": losses, "parameters": weights(engine.module)}
    found["norm"] = zero.gradient_norm(engine)
    groups = engine.basic_optimizer.param_groups
    found["groups"] = {g["name"]: (g["use_muon"], g["lr"], g["weight_decay"]) for g in groups}
    if source is None:
        checkpoints.save(steps, 0.0)
        found["resumed"] = go_back(engine, checkpoints, ema, local_tensors(engine, ema, copy=True)[0])
    checkpoints.close()
    engine.destroy()
    return found


def by_hand(run: RunConfig, steps: int, perturbation: float) -> dict[str, Any]:
    """Compute in one process, without DeepSpeed, the steps of all ranks.

    perturbation: relative noise on the initial weights, to see how far rounding grows in some steps.
    """
    model, values = build(run).train(), run.deepspeed["optimizer"]["params"]
    noise = torch.Generator().manual_seed(3)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    matrices, others, vectors = [], [], []
    for p in model.parameters():
        p.data *= 1 + perturbation * torch.randn(p.shape, generator=noise)
        if p.requires_grad:
            (matrices if id(p) in linear else others if p.ndim > 1 else vectors).append(p)
    decay = values["weight_decay"]
    muon = torch.optim.Muon(
        matrices, values["lr"], decay, values["momentum"], nesterov=True, adjust_lr_fn="original"
    )
    adam = torch.optim.AdamW(
        [{"params": others, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=values["adam_lr"],
        betas=values["betas"],
        eps=values["eps"],
    )
    losses, accumulation = [], run.deepspeed["gradient_accumulation_steps"]
    limit = run.deepspeed["gradient_clipping"]
    for step in range(steps):
        for micro_step in range(accumulation):
            batches = [make_batch(step, micro_step, rank) for rank in range(comm.world_size())]
            loss = mean_loss(model, batches, together=False)
            (loss / accumulation).backward()
            losses.append(float(loss))
        if limit:
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
    return {"losses": losses, "parameters": weights(model), "muon": len(matrices)}


def result_of(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    torch.compiler.set_stance("force_eager")
    by_itself, steps = case.pop("by_hand", None), case.pop("steps", 5)
    source, in_parts = case.pop("source", None), case.pop("in_parts", False)
    with in_float32() if case.pop("float32_iterations", True) else nullcontext():
        run = run_of(case, folder.parent)
        if by_itself is not None:
            return by_hand(run, steps, by_itself) if comm.is_main() else {}
        return with_zero(run, folder, steps, source, in_parts)


if __name__ == "__main__":
    run_cases(result_of)
