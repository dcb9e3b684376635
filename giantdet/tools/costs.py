"""Formulas for the memory and the traffic of a training step: DeepSpeed's states, buckets and collectives.

Bytes of one rank. Checked against DeepSpeed 0.19 in `tests/tools/test_plan.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from giantdet.architectures import Architecture
from giantdet.config.resolved import ResolvedRun
from giantdet.layers.cgbn import CrossGpuBatchNorm
from giantdet.optim.agvm import ranks_of_shard

GIB = 2**30
# Memory besides tensors: CUDA's context, NCCL's buffers, and fragments that the allocator cannot use.
RESERVE = 3 * GIB


class States(NamedTuple):
    """Bytes of a rank's states: what is kept from step to step, and gradients."""

    weights: float
    gradients: float
    master: float
    """The optimizer's float32 weights, where they are a copy of the model's."""
    moments: float


def states(parameters: int, trainable: int, bytes_each: int, moments: int, stage: int, ranks: int) -> States:
    """Return the states of one rank in DeepSpeed 0.19 (Rajbhandari et al. 2020, with its float32 copies).

    `bytes_each` is the size of a weight, `moments` the number of float32 values that the optimizer keeps per
    parameter.
    """
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
    """Return the bytes that a rank sends for gradients and weights per optimizer step, by ring collectives.

    With W ranks, an all-gather or reduce-scatter of n bytes sends n (W - 1) / W, and an all-reduce twice
    that. Stage 2 reduces the gradients in every micro-batch. Stage 3 gathers the weights for the forward
    pass, for the backward pass, and once more for recomputed blocks; frozen ones for the forward pass only.
    """
    part = (ranks - 1) / ranks * bytes_each
    if stage == 0:
        return 2 * part * trainable
    if stage < 3:
        return part * trainable * (accumulation if stage == 2 else 1) + part * trainable
    gathered = (3 if recomputed else 2) * trainable + (parameters - trainable)
    return accumulation * part * (gathered + trainable)


def agvm_traffic(
    run: ResolvedRun, model: Architecture, trainable: int, ranks: int, accumulation: int
) -> float:
    """Return the bytes that a rank sends for AGVM per step, averaged over the interval of its measurements.

    Two float32 values per parameter are all-reduced, or none with all_splits of unscaled gradients. Where
    groups of batch norms are the shards of all_splits, each micro-step all-reduces one inside the group.
    """
    agvm = run.giantdet.agvm
    if not agvm.enabled:
        return 0.0
    shard = ranks_of_shard(norm_ranks(run, model, ranks), ranks, accumulation, agvm.estimator)
    inside = accumulation * 2 * (shard - 1) / shard * 4 * trainable
    takes_norms = agvm.estimator == "all_splits" and not agvm.preconditioned
    across = 0.0 if takes_norms else 2 * (ranks - 1) / ranks * 8 * trainable
    return (inside + across) / agvm.interval


def cgbn_traffic(run: ResolvedRun, model: Architecture, ranks: int) -> float:
    """Return the bytes that a rank sends for CGBN per micro-step.

    The forward pass gathers means and variances over the group, the backward pass all-reduces two sums.
    """
    channels = sum(m.num_features for m in model.modules() if isinstance(m, CrossGpuBatchNorm))
    return 4.0 * (2 * channels + 2 * channels * 2) * (norm_ranks(run, model, ranks) - 1)


def norm_ranks(run: ResolvedRun, model: Architecture, ranks: int) -> int:
    """Return how many ranks the batch norms of CGBN span; 1 without any."""
    if not any(isinstance(m, CrossGpuBatchNorm) for m in model.modules()):
        return 1
    return min(ranks, max(1, run.giantdet.norm.bn_size // run.batch.micro))


def offloads(run: ResolvedRun) -> bool:
    """Return whether the run offloads the optimizer states."""
    return run.zero.offload_optimizer.device != "none"


def persistent(run: ResolvedRun, model: Architecture) -> int:
    """Return the number of parameters in tensors so small that ZeRO-3 keeps them whole on every rank."""
    threshold = run.zero.stage3_param_persistence_threshold
    return sum(p.numel() for p in model.parameters() if p.numel() <= threshold)


def buffers(run: ResolvedRun, parameters: int, trainable: int, bytes_each: int, stage: int) -> float:
    """Return the bytes of DeepSpeed's buckets and, at stage 3, of the weights that are gathered at a time.

    Frozen weights are in no bucket: they have no gradients, and at stages 1 and 2 they are never gathered.
    """
    zero = run.zero
    if stage == 0:
        return 0.0
    bucket = min(trainable, zero.reduce_bucket_size)
    total = bucket * bytes_each * (2 if zero.overlap_comm else 1)
    if stage == 3:
        live = zero.stage3_max_live_parameters + zero.stage3_prefetch_bucket_size
        return total + min(parameters, live) * bytes_each
    return total + min(trainable, zero.allgather_bucket_size) * bytes_each
