"""What a training step keeps and sends, as formulas: DeepSpeed's states, buckets and collectives; GPUs.

Bytes of one rank. Checked against DeepSpeed 0.19 in `tests/tools/test_plan.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from giantdet.architectures import Architecture
from giantdet.config.resolved import ResolvedRun
from giantdet.errors import InputError
from giantdet.layers.cgbn import CrossGpuBatchNorm

GIB = 2**30
# Beside tensors: CUDA's context, NCCL's buffers, what the allocator cannot use.
RESERVE = 3 * GIB


class Machine(NamedTuple):
    """A GPU, from its data sheet: memory in bytes, dense bf16 FLOPs a second."""

    name: str
    memory: float
    flops: float


MACHINES = {
    "a100-40": Machine("A100 40 GB", 40e9, 312e12),
    "a100": Machine("A100 80 GB", 80e9, 312e12),
    "h100": Machine("H100 80 GB", 80e9, 989e12),
    "h200": Machine("H200 141 GB", 141e9, 989e12),
    "b200": Machine("B200 180 GB", 180e9, 2250e12),
}


class States(NamedTuple):
    """Bytes of a rank that stay from step to step, gradients included."""

    weights: float
    gradients: float
    master: float
    """float32 weights of the optimizer, where the model's are not the same."""
    moments: float


def states(parameters: int, trainable: int, bytes_each: int, moments: int, stage: int, ranks: int) -> States:
    """DeepSpeed 0.19's states of one rank, in bytes (Rajbhandari et al. 2020, with its float32 copies)."""
    share = 1.0 / ranks
    # In float32 at stage 0 the optimizer works on the weights themselves.
    copies = stage > 0 or bytes_each < 4
    return States(
        weights=bytes_each * parameters * (share if stage == 3 else 1.0),
        gradients=bytes_each * trainable * (share if stage >= 2 else 1.0),
        master=4.0 * trainable * (share if stage else 1.0) * copies,
        moments=4.0 * moments * trainable * (share if stage else 1.0),
    )


def traffic(
    parameters: int,
    trainable: int,
    bytes_each: int,
    stage: int,
    ranks: int,
    accumulation: int,
    recomputed: bool,
) -> float:
    """Bytes that a rank sends for gradients and weights in one optimizer step, by ring collectives.

    An all-gather or reduce-scatter of n bytes sends n (W - 1) / W, an all-reduce twice that. Stage 2 reduces
    every micro-batch; stage 3 gathers the weights for forward and backward, once more to recompute.
    """
    part = (ranks - 1) / ranks * bytes_each
    if stage == 0:
        return 2 * part * trainable
    if stage < 3:
        return part * trainable * (accumulation if stage == 2 else 1) + part * trainable
    return accumulation * part * ((3 if recomputed else 2) * parameters + trainable)


def agvm_traffic(run: ResolvedRun, trainable: int, ranks: int) -> float:
    """Bytes a step, spread over the interval: two float32 numbers a parameter are all-reduced, or none."""
    agvm = run.giantdet.agvm
    if not agvm.enabled or (agvm.estimator == "all_splits" and not agvm.preconditioned):
        return 0.0
    return 2 * (ranks - 1) / ranks * 8 * trainable / agvm.interval


def cgbn_traffic(run: ResolvedRun, model: Architecture, ranks: int) -> float:
    """Bytes a micro-step: count, means and variances are gathered over the group, two sums come back."""
    group = min(ranks, max(1, run.giantdet.norm.bn_size // run.batch.micro))
    channels = sum(m.num_features for m in model.modules() if isinstance(m, CrossGpuBatchNorm))
    return 4.0 * (2 * channels + 2 * channels * 2) * (group - 1)


def offloads(run: ResolvedRun) -> bool:
    """Does the JSON keep the optimizer's states in the machine's memory?"""
    return run.zero.offload_optimizer.device != "none"


def persistent(run: ResolvedRun, model: Architecture) -> int:
    """Parameters that ZeRO-3 leaves whole on every rank, because gathering them costs more than they do."""
    threshold = run.zero.stage3_param_persistence_threshold
    return sum(p.numel() for p in model.parameters() if p.numel() <= threshold)


def buffers(run: ResolvedRun, parameters: int, bytes_each: int, stage: int) -> float:
    """Bytes of DeepSpeed's buckets, and at stage 3 of the weights that are gathered at a time."""
    zero = run.zero
    if stage == 0:
        return 0.0
    bucket = min(parameters, zero.reduce_bucket_size)
    total = bucket * bytes_each * (2 if zero.overlap_comm else 1)
    if stage == 3:
        live = zero.stage3_max_live_parameters + zero.stage3_prefetch_bucket_size
        return total + min(parameters, live) * bytes_each
    return total + min(parameters, zero.allgather_bucket_size) * bytes_each


def machine_of(name: str, memory: float | None, tflops: float | None) -> Machine:
    """A known GPU, or one described by its numbers (GB, TFLOP/s). ValueError for neither."""
    known: Any = MACHINES.get(name.lower())
    if known is None and (memory is None or tflops is None):
        raise InputError(
            f"unknown GPU '{name}'; known are {', '.join(MACHINES)}, or give --memory GB and --tflops"
        )
    known = known or Machine(name, 0.0, 0.0)
    return Machine(
        known.name, memory * 1e9 if memory else known.memory, tflops * 1e12 if tflops else known.flops
    )
