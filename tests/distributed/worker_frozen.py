"""One rank of test_frozen.py: steps with a frozen backbone under ZeRO, also resumed; on rank 0 the reference.

worker_frozen.py FOLDER CASES_JSON; writes FOLDER/CASE.pt with the observations of each case. The images of
rank 1 contain no object.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from worker_zero import STEPS, build, loss_of, make_batch, run_cases, run_of

from giantdet.architectures import Architecture
from giantdet.checkpoint.saver import Checkpoints
from giantdet.config.resolved import ResolvedRun
from giantdet.distributed import comm
from giantdet.distributed.engine import Engine
from giantdet.engine import zero
from giantdet.optim.agvm import Agvm
from giantdet.optim.ema import WeightEma
from giantdet.optim.fragments import fragments
from giantdet.optim.param_groups import parameter_groups


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Whole parameters and buffers of a module that may be partitioned, in their own dtypes."""
    import deepspeed

    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for name, p in module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            state[name] = p.detach().clone()
    return state


class Watch:
    """Counts what the backbone saves for a backward pass, and records whether its weights arrive in time."""

    def __init__(self, model: Architecture) -> None:
        self.saved, self.early, self.gathered = 0, 0, list[str]()
        self.maps, self.modes = model.backbone.maps, set[bool]()
        model.backbone.maps = self.watched  # type: ignore[method-assign]
        self.model = model
        for module in model.backbone.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(partial(self.before, module.weight), prepend=True)

    def watched(self, images: Tensor) -> list[Tensor]:
        self.modes |= {module.training for module in self.model.backbone.modules()}
        with saved_tensors_hooks(self.keep, lambda kept: kept):
            found = self.maps(images)
        self.gathered = [name for name, p in self.model.backbone.named_parameters() if is_gathered(p)]
        return found

    def keep(self, tensor: Tensor) -> Tensor:
        self.saved += 1
        return tensor

    def before(self, weight: nn.Parameter, *_: Any) -> None:
        """Called before DeepSpeed's own hook, which gathers what is not gathered yet."""
        self.early += is_gathered(weight)


def is_gathered(p: Any) -> bool:
    """Return whether a whole parameter is present, or being gathered, at ZeRO-3."""
    return not hasattr(p, "ds_status") or p.ds_status.name != "NOT_AVAILABLE"


def step_of(engine: Engine, agvm: Agvm | None, step: int) -> float:
    loss = loss_of(engine(make_batch(step, 0, comm.rank())))
    engine.backward(loss)
    if agvm is not None:
        agvm.observe()
        agvm.scale()
    engine.step()
    return comm.mean_over_ranks([float(loss)])[0]


def with_zero(run: ResolvedRun, folder: Path) -> dict[str, Any]:
    model = build(run)
    engine = zero.initialize(model, run)
    engine.eval()
    engine.train()
    before, ema = state_of(model.backbone), WeightEma(engine.module, 0.9)
    agvm = Agvm(engine, run.giantdet.agvm) if run.giantdet.agvm.enabled else None
    checkpoints = Checkpoints(engine, folder, run.giantdet.train, agvm, ema)
    watch = Watch(model)
    losses, norms, early = [], [], []
    for step in range(STEPS):
        if step == STEPS - 1:
            checkpoints.save(step)
        losses.append(step_of(engine, agvm, step))
        norms.append(zero.gradient_norm(engine))
        early.append(watch.early)
        watch.early = 0
        ema.update()
    checkpoints.close()
    with ema.applied():
        averaged = state_of(model.backbone)
    after = state_of(model.backbone)
    optimizer = engine.basic_optimizer
    owners = {id(f.owner): f.owner for f in fragments(engine).values()}.values()
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    partitions = [getattr(p, "ds_tensor", p) for p in model.backbone.parameters()]
    found = {
        "losses": losses,
        "norms": norms,
        "unmoved": [torch.equal(before[k], after[k]) and torch.equal(before[k], averaged[k]) for k in before],
        "gradients": [name for name, p in model.backbone.named_parameters() if p.grad is not None],
        "linked": [name for name, p in model.backbone.named_parameters() if hasattr(p, "_hp_mapping")],
        "saved": watch.saved,
        "modes": watch.modes,
        "early": early,
        "gathered": watch.gathered,
        "linears": sum(isinstance(module, nn.Linear) for module in model.backbone.modules()),
        "dtypes": {p.dtype for p in partitions},
        "held": sum(p.numel() for p in partitions),
        "backbone": sum(getattr(p, "ds_numel", p.numel()) for p in model.backbone.parameters()),
        "trained": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad),
        "owned": sum(p.numel() for p in owners),
        "moments": sum(t.numel() for t in moments if t.ndim),
        "groups": [group["name"] for group in optimizer.param_groups],
        "averages": sorted({name.split(".")[0] for name in ema.parameters}),
        "variances": {} if agvm is None else dict(agvm.variances),
    }
    engine.destroy()
    return found | {"resumed": resumed(run, folder)}


def resumed(run: ResolvedRun, folder: Path) -> float:
    """The last step's loss, from an engine that starts from other weights and then resumes."""
    model = build(run)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    engine = zero.initialize(model, run)
    engine.train()
    agvm = Agvm(engine, run.giantdet.agvm) if run.giantdet.agvm.enabled else None
    ema = WeightEma(engine.module, 0.9)
    assert Checkpoints(engine, folder, run.giantdet.train, agvm, ema).resume() == STEPS - 1
    loss = step_of(engine, agvm, STEPS - 1)
    engine.destroy()
    return loss


def by_hand(run: ResolvedRun) -> dict[str, Any]:
    """All ranks' steps in one process; the backbone's maps come from a copy that no optimizer knows.

    Written without `frozen`: a trainable model whose backbone is in evaluation mode and gets no gradients.
    In bf16 the optimizer works on float32 copies of the other weights.
    DeepSpeed 0.19.8 starts bf16 at stage 0 with a step of zero gradients, which decays these copies once.
    """
    trainable = run.giantdet.model.backbone.model_copy(update={"frozen": False, "drop_path_rate": 0.0})
    section = run.giantdet.model.model_copy(update={"backbone": trainable})
    plain = build(run_with(run, section)).train()
    plain.backbone.eval().requires_grad_(False)
    dtype = zero.weight_dtype(run)
    zero.cast_buffers(plain.to(dtype), dtype)
    trained = {n: p for n, p in plain.named_parameters() if not n.startswith("backbone.")}
    master = {n: nn.Parameter(p.detach().float().clone()) for n, p in trained.items()}
    params = run.deepspeed["optimizer"]["params"]
    decays = {id(p): g["weight_decay"] for g in parameter_groups(plain, 0.05) for p in g["params"]}
    groups = [{"params": [master[n]], "weight_decay": decays[id(p)]} for n, p in trained.items()]
    optimizer = torch.optim.AdamW(groups, lr=params["lr"], eps=params["eps"])
    if run.stage == 0 and dtype == torch.bfloat16:
        for p in master.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    losses, norms = [], []
    for step in range(STEPS):
        batches = [make_batch(step, 0, rank) for rank in range(comm.world_size())]
        loss = torch.stack([loss_of(plain(batch)) for batch in batches]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss))
        for name, p in trained.items():
            assert p.grad is not None, name
            master[name].grad, p.grad = p.grad.float(), None
        gradients = [p.grad for p in master.values() if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        optimizer.step()
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(master[name])
    return {"losses": losses, "norms": norms}


def run_with(run: ResolvedRun, model: Any) -> ResolvedRun:
    return replace(run, giantdet=run.giantdet.model_copy(update={"model": model}))


def result_of(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    by_itself = case.pop("by_hand", False)
    run = run_of(case, folder.parent)
    assert isinstance(run, ResolvedRun)
    if by_itself:
        return by_hand(run) if comm.is_main() else {}  # only the main rank's result is used
    return with_zero(run, folder / "checkpoints")


if __name__ == "__main__":
    run_cases(result_of)
