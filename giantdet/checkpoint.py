"""Save and resume a run, at every ZeRO stage.

DeepSpeed writes the shards (`step_N/`, and `latest` naming the newest). Beside them goes what
DeepSpeed does not keep: the step, the names of the parameter groups, the state of AGVM and of the average
of the weights. Loading, DeepSpeed 0.19 overwrites LR, weight decay and name of every group with the first
group's at ZeRO-3: they are put back. Data order and random numbers are pure
functions of the step (`data/loader.py`, `ops/sampling.py`), so there is no state of theirs to save.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from giantdet.distributed import comm
from giantdet.optim.agvm import Agvm
from giantdet.optim.ema import WeightEma

_PREFIX = "step_"


def save(
    engine: Any,
    folder: Path,
    step: int,
    keep: int,
    agvm: Agvm | None = None,
    ema: WeightEma | None = None,
) -> Path:
    """Write checkpoint `step_N` and remove all but the newest `keep`. All ranks call it."""
    tag = f"{_PREFIX}{step}"
    groups = [group["name"] for group in engine.basic_optimizer.param_groups]
    state = {"step": step, "groups": groups, "agvm": agvm.state_dict() if agvm is not None else None}
    engine.save_checkpoint(str(folder), tag=tag, client_state=state)
    if ema is not None:
        ema.save(folder / tag)
    comm.barrier()
    if comm.is_main():
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    comm.barrier()
    return folder / tag


def resume(engine: Any, folder: Path, agvm: Agvm | None = None, ema: WeightEma | None = None) -> int:
    """Load the newest checkpoint of `folder`; returns the number of steps done, 0 without one.

    LR, schedule and weight decay are the run's own and not those of the checkpoint: what the JSON says.
    """
    if not comm.broadcast_object((folder / "latest").exists()):
        return 0
    own = [_describe(group) for group in engine.basic_optimizer.param_groups]
    path, state = engine.load_checkpoint(str(folder), load_lr_scheduler_states=False)
    if path is None:
        raise ValueError(f"{folder}: the checkpoint that 'latest' names cannot be loaded")
    names = [group["name"] for group in own]
    if names != state["groups"]:
        raise ValueError(f"{path}: saved with the parameter groups {state['groups']}, the run has {names}")
    for group, described in zip(engine.basic_optimizer.param_groups, own, strict=True):
        group.update(described)
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.go_to(engine.global_steps - engine.skipped_steps)
    if agvm is not None and state.get("agvm") is not None:
        agvm.load_state_dict(state["agvm"])
    if ema is not None:
        ema.load(newest(folder))
    return int(state["step"])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(_PREFIX) :]))


def newest(folder: Path) -> Path:
    """The checkpoint that `latest` names. Raises ValueError where there is none."""
    latest = folder / "latest"
    if not latest.exists():
        raise ValueError(f"{folder}: no checkpoint here (no file 'latest')")
    return folder / latest.read_text().strip()


def _describe(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("name", "lr", "weight_decay")}
