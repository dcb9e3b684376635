"""GPUs that `giantdet plan` knows. Light: a wrong name is reported before anything heavy is imported."""

from __future__ import annotations

from typing import NamedTuple

from giantdet.errors import InputError


class Machine(NamedTuple):
    """A GPU, from its data sheet: memory in bytes, dense bf16 FLOP/s."""

    name: str
    memory: float
    flops: float


MACHINES = {
    "a100-40": Machine("A100 40 GB", 40e9, 312e12),
    "a100": Machine("A100 80 GB", 80e9, 312e12),
    "h100": Machine("H100 80 GB", 80e9, 989e12),
    "h200": Machine("H200 141 GB", 141e9, 989e12),
    "b200": Machine("B200 180 GB", 180e9, 2250e12),
    "l40s": Machine("L40S 48 GB", 48e9, 362e12),
    "rtx3090": Machine("RTX 3090 24 GB", 24e9, 71e12),
    "rtx4090": Machine("RTX 4090 24 GB", 24e9, 165e12),
    "rtx5090": Machine("RTX 5090 32 GB", 32e9, 209e12),
}


def machine_of(name: str, memory: float | None, tflops: float | None) -> Machine:
    """Return a known GPU, or one described by `memory` (GB) and `tflops` (TFLOP/s), which take precedence.

    Raises InputError, a ValueError, for an unknown GPU without both numbers.
    """
    known = MACHINES.get(name.lower())
    if known is None and (memory is None or tflops is None):
        raise InputError(
            f"unknown GPU '{name}'; known are {', '.join(MACHINES)}, or give --memory GB and --tflops"
        )
    known = known or Machine(name, 0.0, 0.0)
    return Machine(
        known.name, memory * 1e9 if memory else known.memory, tflops * 1e12 if tflops else known.flops
    )
