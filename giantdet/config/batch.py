"""The three batch sizes of DeepSpeed's JSON, any of which may be missing."""

from __future__ import annotations

from typing import Any

from giantdet.errors import ConfigError

BATCH, MICRO, ACCUMULATION = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)


def solve_batch(deepspeed: dict[str, Any], world_size: int) -> tuple[int, int, int]:
    """Return (train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps).

    Any two of the three, or one of the first two, determine the others by DeepSpeed's rule: the batch is
    the product of micro-batch, accumulation steps and number of processes. Where only one is given there is
    no accumulation.

    Raises ConfigError, with the nearest possible batch size, where there is no solution.
    """
    given = [deepspeed.get(key, "auto") for key in (BATCH, MICRO, ACCUMULATION)]
    batch, micro, accumulation = (None if value == "auto" else int(value) for value in given)
    if batch is None and micro is None:
        raise ConfigError(f"give {BATCH} or {MICRO}; the other one follows from the number of processes")
    if batch is None:
        assert micro is not None
        accumulation = accumulation or 1
        return micro * accumulation * world_size, micro, accumulation
    if micro is None and accumulation is None:
        accumulation = 1
    unit = world_size * (micro or 1) * (accumulation or 1)
    solved = (batch // unit, accumulation) if micro is None else (micro, accumulation or batch // unit)
    micro_size, accumulated = solved[0], solved[1] or 0
    if micro_size * accumulated * world_size != batch or batch < unit:
        complete = micro is not None and accumulation is not None
        possible = unit if complete else max(unit, round(batch / unit) * unit)
        raise ConfigError(
            f"{BATCH} {batch} is not {MICRO} ({given[1]}) x {ACCUMULATION} ({given[2]}) x {world_size} "
            f"process{'es' if world_size > 1 else ''}; nearest possible {BATCH}: {possible}"
        )
    return batch, micro_size, accumulated
