"""One rank of test_zero.py: the same steps at all ZeRO stages, and on rank 0 in plain PyTorch.

worker_zero.py FOLDER CASES_JSON; writes FOLDER/CASE.pt with losses and parameters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny import tiny_run
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from giantdet.architectures import build_model, total_loss
from giantdet.architectures.mask_rcnn import MaskRcnn, Predictions, mask_rcnn_losses
from giantdet.config.architectures.common import NormConfig
from giantdet.config.classes import Classes
from giantdet.config.conventions import CONVENTIONS
from giantdet.config.load import RunConfig, parse_run
from giantdet.config.resolve import resolve
from giantdet.distributed import comm
from giantdet.engine import zero
from giantdet.optim.param_groups import parameter_groups
from giantdet.structures import Batch, Targets

STEPS = 3


def make_batch(step: int, micro_step: int, rank: int) -> Batch:
    """Noise with bright rectangles as objects; images of odd ranks have none."""
    rng = torch.Generator().manual_seed(10_000 * step + 100 * micro_step + rank)
    count, slots, side = 2, 6, 14
    images = torch.randint(0, 160, (count, 3, 64, 64), dtype=torch.uint8, generator=rng)
    corner = torch.randint(0, 30, (count, slots, 2), generator=rng).float()
    extent = torch.randint(8, 32, (count, slots, 2), generator=rng).float()
    boxes = torch.cat([corner, corner + extent], -1)
    valid = torch.arange(slots).expand(count, slots) < (0 if rank % 2 else 3)
    for b in range(count):
        for x0, y0, x1, y1 in boxes[b][valid[b]].long().tolist():
            images[b, :, y0:y1, x0:x1] = 230
    boxes = boxes * valid[..., None]
    targets = Targets(
        boxes_BM4=boxes,
        labels_BM=torch.randint(0, 4, (count, slots), generator=rng) * valid,
        valid_BM=valid,
        masks_BMSS=torch.full((count, slots, side, side), 255, dtype=torch.uint8) * valid[..., None, None],
        frames_BM4=boxes,
    )
    return Batch(
        images_B3HW=images,
        sizes_B2=torch.tensor([[64.0, 64.0], [56.0, 64.0]]),
        targets=targets,
        seeds_B=torch.arange(count) + 1000 * step + 10 * rank + 100 * micro_step,
        image_ids_B=torch.arange(count),
        original_sizes_B2=torch.tensor([[64, 64], [56, 64]]),
    )


def build(run: RunConfig, norm: NormConfig | None = None) -> MaskRcnn:
    torch.manual_seed(0)
    micro_batch = run.deepspeed["train_micro_batch_size_per_gpu"]
    return build_model(run.giantdet.model, (64, 64), norm or run.giantdet.norm, micro_batch)


def run_of(case: dict[str, Any], folder: Path) -> RunConfig:
    raw = tiny_run(folder, folder, giantdet__model__num_classes=4, **case)
    # Far above rounding noise, which AdamW would otherwise amplify to steps as large as the LR.
    if raw["optimizer"]["type"] == "AdamW":
        raw["optimizer"]["params"]["eps"] = 1e-4
    return resolve(
        parse_run(raw), comm.world_size(), train_images=100, classes=Classes.numbered(4), has_gpu=False
    )


def loss_of(predictions: Predictions) -> torch.Tensor:
    return total_loss(mask_rcnn_losses(predictions, CONVENTIONS["detectron2"]))


def mean_loss(model: MaskRcnn, batches: list[Batch], together: bool) -> torch.Tensor:
    """Mean of the ranks' losses, each of its own batch; batch norms see all batches together or one only."""
    if not together:
        return torch.stack([loss_of(model(batch)) for batch in batches]).mean()
    leaves, spec = zip(*(tree_flatten(batch) for batch in batches), strict=True)
    # windows_B6 is None
    joined = [None if parts[0] is None else torch.cat(parts) for parts in zip(*leaves, strict=True)]
    whole = model(tree_unflatten(joined, spec[0]))
    each = len(batches[0].image_ids_B)
    parts = [
        tree_map_only(torch.Tensor, lambda t, r=r: t[each * r : each * (r + 1)], whole)
        for r in range(len(batches))
    ]
    return torch.stack([loss_of(part) for part in parts]).mean()


def statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.detach().clone() for n, b in model.named_buffers() if "running" in n or "tracked" in n}


def with_zero(run: RunConfig) -> dict[str, Any]:
    engine = zero.initialize(build(run), run)
    engine.train()
    losses, norms = [], []
    for step in range(STEPS):
        for micro_step in range(engine.gradient_accumulation_steps()):
            loss = loss_of(engine(make_batch(step, micro_step, comm.rank())))
            engine.backward(loss)
            engine.step()
            losses.append(comm.mean_over_ranks([float(loss)])[0])
        norms.append(zero.gradient_norm(engine))
        if step == 0:
            first = statistics(engine.module)
    parameters = {}
    import deepspeed

    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            parameters[name] = parameter.detach().float().clone()
    groups = {g["name"]: g["weight_decay"] for g in engine.basic_optimizer.param_groups}
    moved = statistics(engine.module)
    with zero.averaged_statistics(engine):
        for name, buffer in statistics(engine.module).items():
            if run.giantdet.norm.type == "cgbn":
                assert torch.equal(buffer, moved[name]), f"{name} differs over the group"
    assert all(torch.equal(buffer, moved[name]) for name, buffer in statistics(engine.module).items())
    engine.destroy()
    return {
        "losses": losses,
        "norms": norms,
        "parameters": parameters,
        "groups": groups,
        "moved": moved,
        "first": first,
    }


def by_hand(run: RunConfig) -> dict[str, Any]:
    """Compute in one process, without DeepSpeed, the steps of all ranks."""
    together = run.giantdet.norm.type == "cgbn"
    model = build(run, NormConfig(type="local")).train()
    params = run.deepspeed["optimizer"]["params"]
    groups = parameter_groups(model, params["weight_decay"], params["lr"])
    optimizer = torch.optim.AdamW(groups, eps=params["eps"])
    accumulation = run.deepspeed["gradient_accumulation_steps"]
    clipping = run.deepspeed["gradient_clipping"]
    losses, norms = [], []
    for step in range(STEPS):
        for micro_step in range(accumulation):
            batches = [make_batch(step, micro_step, rank) for rank in range(comm.world_size())]
            loss = mean_loss(model, batches, together)
            (loss / accumulation).backward()
            losses.append(float(loss))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        norms.append(float(norm))
        if clipping:
            for gradient in gradients:
                gradient *= min(1.0, clipping / (float(norm) + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            first = statistics(model)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = statistics(model)
    return {"losses": losses, "norms": norms, "parameters": parameters, "moved": moved, "first": first}


def run_cases(result_of: Callable[[dict[str, Any], Path], object]) -> None:
    """The main program of `worker_*.py FOLDER CASES_JSON`: rank 0 writes each case's FOLDER/CASE.pt.

    `result_of` takes a case and FOLDER/CASE, a folder that the case may create.
    """
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    comm.start()
    torch.set_num_threads(1)
    for name, case in cases.items():
        found = result_of(case, folder / name)
        if comm.is_main():
            torch.save(found, folder / f"{name}.pt")
        comm.barrier()
    comm.stop()


def result_of(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    by_itself, backend = case.pop("by_hand", False), case.pop("backend", None)
    run = run_of(case, folder.parent)
    if by_itself:
        return by_hand(run) if comm.is_main() else {}  # only the main rank's result is used
    torch._dynamo.reset()
    counters.clear()
    with patch("torch.compile", partial(torch.compile, backend=backend or "inductor")):
        result = with_zero(run)
    return {**result, "graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}


if __name__ == "__main__":
    run_cases(result_of)
