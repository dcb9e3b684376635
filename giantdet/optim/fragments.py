"""Where DeepSpeed keeps the float32 weights and the optimizer's state, at every ZeRO stage.

DeepSpeed has no public way to these at stages 1 and 2 short of a collective for each parameter. What is read
here are private attributes of DeepSpeed 0.19, one function a layout; `tests/distributed/test_agvm.py` holds
the moments to those computed without DeepSpeed, `test_resume.py` weights and states to other stages'.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from giantdet.distributed import comm


class Fragment(NamedTuple):
    """A rank's part [first, last) of a flattened parameter, and where the optimizer has it."""

    first: int
    last: int
    group: dict[str, Any]  # of the optimizer: LR, betas, eps
    owner: Tensor  # what the optimizer steps: float32 weights, of one parameter or of many, flat
    start: int  # of the fragment in the flattened `owner`

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment in `owner` or in a tensor of its shape: a view, flat."""
        return tensor.detach().view(-1)[self.start : self.start + self.last - self.first]

    def weights(self) -> Tensor:
        return self.of(self.owner)

    def cut(self, first: int, last: int) -> Fragment:
        """Its part [first, last) of the parameter."""
        return self._replace(first=first, last=last, start=self.start + first - self.first)

    def state(self, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizer's state: by name the fragments of what each element has, and single values.

        Both are empty before the first step.
        """
        elements, values = {}, {}
        for key, value in optimizer.state.get(self.owner, {}).items():
            if isinstance(value, Tensor) and value.shape == self.owner.shape and key != "step":
                elements[key] = self.of(value)
            elif isinstance(value, Tensor | int | float):
                values[key] = value
        return elements, values


def even_share(size: int) -> tuple[int, int]:
    """[first, last) of `size` elements for this rank; over the ranks all of them exactly once."""
    world, rank = comm.world_size(), comm.rank()
    return size * rank // world, size * (rank + 1) // world


def share_of(p: Any) -> tuple[int, int]:
    """[first, last) of a flattened parameter: what ZeRO-3 keeps on this rank, before it an even share."""
    if not hasattr(p, "ds_id"):
        return even_share(p.numel())
    size = p.partition_numel()
    return min(comm.rank() * size, p.ds_numel), min((comm.rank() + 1) * size, p.ds_numel)


def local_share(p: Any) -> Tensor:
    """`share_of` a contiguous model parameter: a view, flat. ZeRO-3 has it, padded, as `ds_tensor`."""
    first, last = share_of(p)
    flat: Tensor = p.ds_tensor if hasattr(p, "ds_id") else p.data.flatten()
    return flat[: last - first] if hasattr(p, "ds_id") else flat[first:last]


def fragments(engine: Any) -> dict[nn.Parameter, Fragment]:
    """What this rank holds of each trainable parameter: all of it at stage 0, then its partition.

    Parameters of which this rank has nothing are left out. RuntimeError where DeepSpeed has moved.
    """
    optimizer = engine.optimizer
    try:
        if engine.zero_optimization_stage() == 3:
            return _of_stage_3(engine)
        if hasattr(optimizer, "round_robin_bit16_groups"):  # stages 1 and 2
            return _of_flat(engine, optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets)
        if hasattr(optimizer, "bf16_groups"):  # stage 1 in bf16 with float32 accumulation
            return _of_flat(engine, optimizer.bf16_groups)
        return _of_stage_0(engine)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        import deepspeed

        raise RuntimeError(
            f"cannot find the optimizer's state in DeepSpeed {deepspeed.__version__} ({error!r}), where 0.19 "
            "has it: checkpoints and preconditioned AGVM need that version"
        ) from error


def shares(engine: Any) -> dict[nn.Parameter, Fragment]:
    """This rank's fragment of each trainable parameter; over the ranks they cover all of it exactly once."""
    found = fragments(engine)
    if engine.zero_optimization_stage() > 0:
        return found
    return {p: fragment.cut(*even_share(fragment.last)) for p, fragment in found.items()}


def _of_stage_3(engine: Any) -> dict[nn.Parameter, Fragment]:
    """Each parameter is cut into equal parts, one a rank; a rank's parts lie in flat sub-groups."""
    optimizer, groups = engine.optimizer, engine.basic_optimizer.param_groups
    found = {}
    for i, members in enumerate(optimizer.fp16_groups):
        owner, group = optimizer.fp32_partitioned_groups_flat[i], groups[optimizer.sub_group_to_group_id[i]]
        start = 0
        for p in members:
            first, last = share_of(p)
            if first < last:  # the last ranks' parts may be padding alone
                found[p] = Fragment(first, last, group, owner, start)
            start += p.partition_numel()
    return found


def _of_flat(
    engine: Any, members: list[list[Any]], offsets: list[list[int]] | None = None
) -> dict[nn.Parameter, Fragment]:
    """The parameters of a group one after the other, or at `offsets`, cut into equal parts, one a rank."""
    found = {}
    for i, group in enumerate(engine.basic_optimizer.param_groups):
        (owner,) = group["params"]
        begin, offset = comm.rank() * owner.numel(), 0
        for j, p in enumerate(members[i]):
            offset = offset if offsets is None else offsets[i][j]
            first, last = max(0, begin - offset), min(p.numel(), begin + owner.numel() - offset)
            if first < last:
                found[p] = Fragment(first, last, group, owner, offset + first - begin)
            offset += p.numel()
    return found


def _of_stage_0(engine: Any) -> dict[nn.Parameter, Fragment]:
    """Every rank has all of it; bf16 keeps float32 copies, flat or one by one."""
    found: dict[nn.Parameter, Fragment] = {}
    for i, group in enumerate(engine.basic_optimizer.param_groups):
        owners = group["params"]
        members = engine.optimizer.fp16_groups[i] if hasattr(engine.optimizer, "fp16_groups") else owners
        is_flat, offset = len(owners) != len(members), 0
        for j, p in enumerate(members):
            found[p] = Fragment(0, p.numel(), group, owners[0 if is_flat else j], offset if is_flat else 0)
            offset += p.numel()
    return found


# Writing: what a checkpoint has to do after it has filled the fragments


def create_states(engine: Any) -> None:
    """Give the optimizer the states that it makes in its first step, of whatever content.

    By a step with gradients and LR of zero, as DeepSpeed does it at stage 0, owner by owner. The weights are
    to be overwritten afterwards.
    """
    optimizer = engine.basic_optimizer
    owners = {id(f.owner): (f.owner, f.group) for f in fragments(engine).values()}
    kept = [(group, group["params"], group["lr"]) for group in optimizer.param_groups]
    for group, *_ in kept:
        group["params"], group["lr"] = [], 0.0
    for owner, group in owners.values():
        gradient, owner.grad = owner.grad, torch.zeros_like(owner)
        group["params"] = [owner]
        optimizer.step()
        group["params"], owner.grad = [], gradient
    for group, params, lr in kept:
        group["params"], group["lr"] = params, lr


@torch.no_grad()
def publish(engine: Any) -> None:
    """Bring what was written into the fragments to the model's own weights. All ranks call it."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()  # gathers the small weights, which every rank keeps whole
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        for p, fragment in fragments(engine).items():
            p.data.copy_(fragment.weights().view_as(p))
