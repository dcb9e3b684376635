"""Where DeepSpeed keeps the float32 weights and the optimizer's state, at every ZeRO stage.

At stages 1 and 2 DeepSpeed's public functions need a collective for each parameter. This file reads private
attributes instead, one function for each layout. They exist with this meaning since DeepSpeed 0.19.7, which
added `round_robin_bit16_offsets` and padding between parameters. `tests/distributed/test_agvm.py` compares
the moments with those computed without DeepSpeed, `test_resume.py` weights and states between stages.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from giantdet.distributed import comm
from giantdet.distributed.engine import Engine

MUON = "momentum_buffer"


class Fragment(NamedTuple):
    """A rank's part [first, last) of a flattened parameter, and where the optimizer keeps it."""

    first: int
    last: int
    group: dict[str, Any]  # of the optimizer: LR, betas, eps
    owner: Tensor  # what the optimizer steps: float32 weights, of one parameter or of many, flat
    start: int  # of the fragment in the flattened `owner`
    whole: slice | None = None  # of the parameter in Muon's momentum at stages 1 and 2, see `_of_flat`

    def of(self, tensor: Tensor) -> Tensor:
        """Return a flat view of the fragment in `owner`, or in a tensor of its shape."""
        return tensor.detach().view(-1)[self.start : self.start + self.last - self.first]

    def weights(self) -> Tensor:
        return self.of(self.owner)

    def cut(self, first: int, last: int) -> Fragment:
        """Return the part [first, last) of the parameter, which lies in this fragment."""
        return self._replace(first=first, last=last, start=self.start + first - self.first)

    def state(self, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the optimizer's state by name: fragments of elementwise tensors, and single values.

        Both are empty before the first step.
        """
        elements, values = {}, {}
        for key, value in optimizer.state.get(self.owner, {}).items():
            if key == MUON and self.whole is not None:
                elements[key] = value[self.whole][self.first : self.last]
            elif isinstance(value, Tensor) and value.shape == self.owner.shape and key != "step":
                elements[key] = self.of(value)
            elif isinstance(value, Tensor | int | float):
                values[key] = value
        return elements, values

    def whole_state(self, optimizer: Any) -> dict[str, Tensor]:
        """Return what this rank keeps of the state of the whole parameter, beyond its fragment."""
        return {} if self.whole is None else {MUON: optimizer.state[self.owner][MUON][self.whole]}


def whole_shape(p: Any) -> torch.Size:
    """Return the shape of the whole parameter, which is an empty tensor where ZeRO-3 has partitioned it."""
    shape: torch.Size = getattr(p, "ds_shape", p.shape)
    return shape


def even_share(size: int) -> tuple[int, int]:
    """Return this rank's [first, last) of `size` elements; the ranks' shares cover each element once."""
    world, rank = comm.world_size(), comm.rank()
    return size * rank // world, size * (rank + 1) // world


def share_of(p: Any) -> tuple[int, int]:
    """Return [first, last) of a flattened parameter: ZeRO-3's partition, at other stages an even share."""
    if not hasattr(p, "ds_id"):
        return even_share(p.numel())
    size = p.partition_numel()
    return min(comm.rank() * size, p.ds_numel), min((comm.rank() + 1) * size, p.ds_numel)


def local_share(p: Any) -> Tensor:
    """Return a flat view of `share_of` a contiguous parameter; ZeRO-3 keeps it, padded, in `ds_tensor`."""
    first, last = share_of(p)
    flat: Tensor = p.ds_tensor if hasattr(p, "ds_id") else p.data.flatten()
    return flat[: last - first] if hasattr(p, "ds_id") else flat[first:last]


def fragments(engine: Engine) -> dict[nn.Parameter, Fragment]:
    """Return what this rank holds of each trainable parameter: all of it at stage 0, else its partition.

    Parameters of which this rank holds nothing are left out. Raises RuntimeError for another version of
    DeepSpeed that keeps its state elsewhere.
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
            f"cannot find the optimizer's state in DeepSpeed {deepspeed.__version__} ({error!r}): "
            "checkpoints and preconditioned AGVM need the layout of 0.19.8; install that version"
        ) from error


def shares(engine: Engine) -> dict[nn.Parameter, Fragment]:
    """Return this rank's fragment of each trainable parameter; the ranks' fragments cover it exactly once."""
    found = fragments(engine)
    if engine.zero_optimization_stage() > 0:
        return found
    return {p: fragment.cut(*even_share(fragment.last)) for p, fragment in found.items()}


def _of_stage_3(engine: Engine) -> dict[nn.Parameter, Fragment]:
    """Each parameter is cut into equal parts, one per rank; a rank's parts lie in flat sub-groups."""
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
    engine: Engine, members: list[list[Any]], offsets: list[list[int]] | None = None
) -> dict[nn.Parameter, Fragment]:
    """A group's parameters lie one after the other, or at `offsets`, cut into equal parts, one per rank.

    Of parameters that Muon orthogonalises, each of their ranks keeps the whole momentum, one after the other.
    """
    found = {}
    for i, group in enumerate(engine.basic_optimizer.param_groups):
        wholes: dict[nn.Parameter, slice] = {}
        if offsets is not None and group.get("use_muon"):
            ends = [*accumulate((p.numel() for p in engine.optimizer.params_in_partition[i]), initial=0)]
            wholes = dict(
                zip(engine.optimizer.params_in_partition[i], map(slice, ends, ends[1:]), strict=False)
            )
        (owner,) = group["params"]
        begin, offset = comm.rank() * owner.numel(), 0
        for j, p in enumerate(members[i]):
            offset = offset if offsets is None else offsets[i][j]
            first, last = max(0, begin - offset), min(p.numel(), begin + owner.numel() - offset)
            if first < last:
                found[p] = Fragment(first, last, group, owner, offset + first - begin, wholes.get(p))
            offset += p.numel()
    return found


def _of_stage_0(engine: Engine) -> dict[nn.Parameter, Fragment]:
    """Every rank has all parameters; 16 bits add float32 copies, flat or one by one."""
    found: dict[nn.Parameter, Fragment] = {}
    for i, group in enumerate(engine.basic_optimizer.param_groups):
        owners = group["params"]
        members = engine.optimizer.fp16_groups[i] if hasattr(engine.optimizer, "fp16_groups") else owners
        is_flat, offset = len(owners) != len(members), 0
        for j, p in enumerate(members):
            found[p] = Fragment(0, p.numel(), group, owners[0 if is_flat else j], offset if is_flat else 0)
            offset += p.numel()
    return found


# Loading a checkpoint


def create_states(engine: Engine) -> None:
    """Let the optimizer create the states of its first step; their content and the weights are to be loaded.

    By a step with gradients and LR of zero, as DeepSpeed does at stage 0, one owner at a time.
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
        if group.get("use_muon") and MUON not in optimizer.state[owner]:
            _create_momentum(engine, group, owner)
        group["params"], owner.grad = [], gradient
    for group, params, lr in kept:
        group["params"], group["lr"] = params, lr


def _create_momentum(engine: Engine, group: dict[str, Any], owner: Tensor) -> None:
    """Create the momentum of Muon's partition, which DeepSpeed does before the optimizer's step."""
    optimizer, size, dtype = engine.optimizer, owner.numel(), torch.float32
    if engine.zero_optimization_stage() == 3:
        dtype = optimizer.communication_data_type
    elif hasattr(optimizer, "params_in_partition"):
        names = [g["name"] for g in engine.basic_optimizer.param_groups]
        size = sum(p.numel() for p in optimizer.params_in_partition[names.index(group["name"])])
    engine.basic_optimizer.state[owner][MUON] = torch.zeros(size, dtype=dtype, device=owner.device)


@torch.no_grad()
def publish(engine: Engine) -> None:
    """Copy the fragments' weights to the model's own. All ranks call it."""
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
