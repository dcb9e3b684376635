"""Where DeepSpeed keeps Adam's second moments: a fragment of every parameter's, at every ZeRO stage.

DeepSpeed has no public way to this at stages 1 and 2 short of a collective for each parameter. What is read
here are private attributes of DeepSpeed 0.19, one function a layout; `tests/distributed/test_agvm.py` holds
each of them to the moments computed without DeepSpeed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from giantdet.distributed import comm


class Fragment(NamedTuple):
    """The part [first, last) of a flattened parameter whose optimizer state this rank has."""

    first: int
    last: int
    group: dict[str, Any]  # of the optimizer: LR, betas, eps
    moment: Tensor | None  # [last - first], `exp_avg_sq`; None before the first step


def second_moments(engine: Any) -> dict[nn.Parameter, Fragment]:
    """This rank's fragment of each trainable parameter; over the ranks they cover all of it exactly once.

    Parameters of which this rank has nothing are left out. RuntimeError where DeepSpeed has moved.
    """
    parameters: list[Any] = [p for p in engine.module.parameters() if p.requires_grad]
    try:
        if engine.zero_optimization_stage() == 3:
            return _of_stage_3(engine, parameters)
        if any(hasattr(p, "_hp_mapping") for p in parameters):
            return _of_flat_partitions(engine, parameters)
        return _of_stage_0(engine)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        import deepspeed

        raise RuntimeError(
            f"agvm cannot find Adam's second moments in DeepSpeed {deepspeed.__version__} ({error!r}), where "
            "0.19 has them: set agvm.preconditioned false"
        ) from error


def even_share(size: int) -> tuple[int, int]:
    """[first, last) of `size` elements for this rank; over the ranks all of them exactly once."""
    world, rank = comm.world_size(), comm.rank()
    return size * rank // world, size * (rank + 1) // world


def _of_stage_3(engine: Any, parameters: list[Any]) -> dict[nn.Parameter, Fragment]:
    """Each parameter is cut into equal parts, one a rank; a rank's parts lie in flat sub-groups."""
    optimizer, base = engine.optimizer, engine.basic_optimizer
    group_of = {id(p): group for p, group in _original_groups(engine)}
    found = {}
    for p in parameters:
        sub_group, offset, _ = optimizer.grad_position[optimizer.get_param_id(p)]
        first = comm.rank() * p.partition_numel()
        last = min(first + p.partition_numel(), p.ds_numel)
        if first < last:  # the last ranks' parts may be padding alone
            state = base.state.get(optimizer.fp32_partitioned_groups_flat[sub_group], {})
            moment = _cut(state, offset, last - first)
            found[p] = Fragment(first, last, group_of[id(p)], moment)
    return found


def _original_groups(engine: Any) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    """Stage 3 empties its optimizer's groups; `fp16_groups` keeps the parameters, in the groups' order."""
    optimizer, groups = engine.optimizer, engine.basic_optimizer.param_groups
    pairs = []
    for sub_group, members in enumerate(optimizer.fp16_groups):
        group = groups[optimizer.sub_group_to_group_id[sub_group]]
        pairs += [(p, group) for p in members]
    return pairs


def _of_flat_partitions(engine: Any, parameters: list[Any]) -> dict[nn.Parameter, Fragment]:
    """Stages 1 and 2, and bf16 with float32 accumulation: one flat partition for each group of a rank."""
    base = engine.basic_optimizer
    found = {}
    for p in parameters:
        mapping = p._hp_mapping
        if mapping is None:
            continue
        group = base.param_groups[mapping.param_group_index]
        mine, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        moment = _cut(base.state.get(group["params"][0], {}), flat.start, flat.numel)
        found[p] = Fragment(mine.start, mine.start + mine.numel, group, moment)
    return found


def _of_stage_0(engine: Any) -> dict[nn.Parameter, Fragment]:
    """Every rank has all of it, and takes an equal share; bf16 keeps float32 copies, flat or one by one."""
    optimizer, base = engine.optimizer, engine.basic_optimizer
    found: dict[nn.Parameter, Fragment] = {}
    for i, group in enumerate(base.param_groups):
        members = optimizer.fp16_groups[i] if hasattr(optimizer, "fp16_groups") else group["params"]
        is_flat = len(group["params"]) != len(members)
        offset = 0
        for j, p in enumerate(members):
            first, last = even_share(p.numel())
            state = base.state.get(group["params"][0 if is_flat else j], {})
            start = offset + first if is_flat else first
            found[p] = Fragment(first, last, group, _cut(state, start, last - first))
            offset += p.numel()
    return found


def _cut(state: dict[str, Any], start: int, length: int) -> Tensor | None:
    """`exp_avg_sq[start : start + length]`, flattened; None where there is no state yet."""
    if not state:
        return None
    moment = state["exp_avg_sq"]
    assert isinstance(moment, torch.Tensor)
    return moment.flatten()[start : start + length]
