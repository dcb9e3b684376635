"""What a run needs on a cluster: memory of a rank, communication and time of a step, before it is started.

Weights, optimizer states and gradients follow from the number of parameters, the precision and the ZeRO
stage; activations and FLOPs are counted (`count.py`); communication is that of ring collectives. Time is
computation at a stated share of the machine's peak, and communication at a stated bandwidth; DeepSpeed
overlaps part of the two, so that a step takes between the longer one and their sum.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from giantdet.config.checks import ConfigError
from giantdet.config.load import RunConfig
from giantdet.config.resolve import resolve
from giantdet.distributed.cgbn import CrossGpuBatchNorm
from giantdet.engine.count import Count, count, meta_detector
from giantdet.engine.zero import stage_of, weight_dtype
from giantdet.models.detector import Detector

GIB = 2**30
# Beside tensors: CUDA's context, NCCL's buffers, what the allocator cannot use.
RESERVE = 3 * GIB
# Moments a parameter, float32.
MOMENTS = {"AdamW": 2, "Adam": 2, "Lamb": 2, "SGD": 1, "Lion": 1, "Lars": 1, "Muon": 1}


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


class Choice(NamedTuple):
    """One way to run: its memory, its largest micro-batch, its step."""

    stage: int
    checkpointing: bool
    memory: float
    largest: int
    computation: float
    communication: float

    @property
    def seconds(self) -> float:
        """Of a step without any overlap."""
        return self.computation + self.communication

    def fits(self, machine: Machine) -> bool:
        return self.memory <= machine.memory


def states(parameters: int, trainable: int, bytes_each: int, moments: int, stage: int, ranks: int) -> States:
    """DeepSpeed 0.19's states of one rank, in bytes (Rajbhandari et al. 2020, with its float32 copies)."""
    share = 1.0 / ranks
    copies = (
        stage > 0 or bytes_each < 4
    )  # in float32 at stage 0 the optimizer works on the weights themselves
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
    checkpointing: bool,
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
    return accumulation * part * ((3 if checkpointing else 2) * parameters + trainable)


def agvm_traffic(run: RunConfig, trainable: int, ranks: int) -> float:
    """Bytes a step, spread over the interval: two float32 numbers a parameter are all-reduced, or none."""
    agvm = run.giantdet.agvm
    if not agvm.enabled or (agvm.estimator == "all_splits" and not agvm.preconditioned):
        return 0.0
    return 2 * (ranks - 1) / ranks * 8 * trainable / agvm.interval


def cgbn_traffic(run: RunConfig, model: Detector, ranks: int) -> float:
    """Bytes a micro-step: count, means and variances are gathered over the group, two sums come back."""
    micro_batch = run.deepspeed["train_micro_batch_size_per_gpu"]
    group = min(ranks, max(1, run.giantdet.norm.bn_size // micro_batch))
    channels = sum(m.num_features for m in model.modules() if isinstance(m, CrossGpuBatchNorm))
    return 4.0 * (2 * channels + 2 * channels * 2) * (group - 1)


def buffers(run: RunConfig, parameters: int, bytes_each: int, stage: int) -> float:
    """Bytes of DeepSpeed's buckets, and at stage 3 of the weights that are gathered at a time."""
    zero = run.deepspeed.get("zero_optimization", {})
    if stage == 0:
        return 0.0
    bucket = min(parameters, zero.get("reduce_bucket_size", int(5e8)))
    total = bucket * bytes_each * (2 if zero.get("overlap_comm") else 1)
    if stage == 3:
        live = zero.get("stage3_max_live_parameters", int(1e9)) + zero.get(
            "stage3_prefetch_bucket_size", int(5e7)
        )
        return total + min(parameters, live) * bytes_each
    return total + min(parameters, zero.get("allgather_bucket_size", int(5e8))) * bytes_each


def with_checkpointing(run: RunConfig, wanted: bool) -> RunConfig:
    backbone = run.giantdet.model.backbone.model_copy(update={"checkpoint_blocks": wanted})
    model = run.giantdet.model.model_copy(update={"backbone": backbone})
    return replace(run, giantdet=run.giantdet.model_copy(update={"model": model}))


class Plan:
    """A resolved run on `gpus` GPUs; `bandwidth` in bytes a second of each, `efficiency` of its peak."""

    def __init__(
        self, run: RunConfig, gpus: int, machine: Machine, bandwidth: float, efficiency: float
    ) -> None:
        self.run, self.gpus, self.machine = run, gpus, machine
        self.bandwidth, self.efficiency = bandwidth, efficiency
        self.model = meta_detector(run)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.bytes_each = weight_dtype(run).itemsize
        self.moments = MOMENTS[run.deepspeed["optimizer"]["type"]]
        self.micro_batch = run.deepspeed["train_micro_batch_size_per_gpu"]
        self.accumulation = run.deepspeed["gradient_accumulation_steps"]
        self.counts = {c: self._count(c) for c in self._checkpointing()}
        self.choices = [self._choice(stage, c) for c in self.counts for stage in range(4)]
        self.own = next(
            choice
            for choice in self.choices
            if choice.stage == stage_of(run)
            and choice.checkpointing == run.giantdet.model.backbone.checkpoint_blocks
        )

    def _checkpointing(self) -> list[bool]:
        """With and without, where the backbone can do both."""
        wanted = self.run.giantdet.model.backbone.checkpoint_blocks
        try:
            meta_detector(with_checkpointing(self.run, True))
        except ValueError:
            return [wanted]
        return [False, True]

    def _count(self, checkpointing: bool) -> tuple[Count, Count]:
        run = with_checkpointing(self.run, checkpointing)
        return count(run, 1), count(run, 2)

    def activations(self, checkpointing: bool, images: int) -> float:
        """Bytes at a micro-batch, from those at 1 and 2."""
        one, two = self.counts[checkpointing]
        return one.memory + (images - 1) * (two.memory - one.memory)

    def fixed(self, stage: int, ranks: int | None = None) -> float:
        """Bytes that do not depend on the micro-batch."""
        sizes = (self.parameters, self.trainable, self.bytes_each, self.moments, stage)
        held = sum(states(*sizes, ranks or self.gpus))
        return held + buffers(self.run, self.parameters, self.bytes_each, stage) + RESERVE

    def _choice(self, stage: int, checkpointing: bool) -> Choice:
        one, two = self.counts[checkpointing]
        fixed = self.fixed(stage)
        each = max(1, two.memory - one.memory)
        room = self.machine.memory - fixed - one.memory
        flops = (one.forward + one.backward) * self.micro_batch * self.accumulation
        sent = traffic(
            self.parameters,
            self.trainable,
            self.bytes_each,
            stage,
            self.gpus,
            self.accumulation,
            checkpointing,
        )
        sent += agvm_traffic(self.run, self.trainable, self.gpus)
        sent += self.accumulation * cgbn_traffic(self.run, self.model, self.gpus)
        return Choice(
            stage,
            checkpointing,
            memory=fixed + self.activations(checkpointing, self.micro_batch),
            largest=1 + math.floor(room / each) if room >= 0 else 0,
            computation=flops / (self.machine.flops * self.efficiency),
            communication=sent / self.bandwidth if self.gpus > 1 else 0.0,
        )

    def best(self) -> Choice | None:
        """The quickest that fits; of those within 2% of it, the one with the least memory."""
        fitting = [choice for choice in self.choices if choice.fits(self.machine)]
        quickest = min((c.seconds for c in fitting), default=0.0)
        near = [choice for choice in fitting if choice.seconds <= 1.02 * quickest]
        return min(near, key=lambda choice: choice.memory, default=None)

    def fewest_gpus(self) -> int | None:
        """GPUs from which on the run's micro-batch fits at ZeRO-3 with checkpointing; None: on no number."""
        checkpointing = max(self.counts)
        held = self.activations(checkpointing, self.micro_batch)
        if self.fixed(3, 10**9) + held > self.machine.memory:
            return None
        gpus = 1
        while self.fixed(3, gpus) + held > self.machine.memory:
            gpus += 1
        return gpus


def make_plan(
    run: RunConfig, gpus: int, machine: Machine, bandwidth: float, efficiency: float, images: int
) -> Plan:
    """Of an unresolved run; `images` is the training set's size. ConfigError for a batch that cannot be."""
    model = run.giantdet.model.model_copy(update={"num_classes": 80})
    if run.giantdet.model.num_classes == "auto":
        run = replace(run, giantdet=run.giantdet.model_copy(update={"model": model}))
    try:
        resolved = resolve(run, gpus, images)
    except ConfigError as error:
        raise ConfigError(f"{gpus} GPUs: {error}") from None
    return Plan(resolved, gpus, machine, bandwidth, efficiency)


def report(plan: Plan) -> str:
    """The plan as text."""
    run, deepspeed = plan.run, plan.run.deepspeed
    batch, steps = deepspeed["train_batch_size"], run.giantdet.train.steps
    one, _ = plan.counts[plan.own.checkpointing]
    lines = [
        f"{run.path.stem if run.path else 'run'}: batch {batch} = {plan.micro_batch} x {plan.accumulation} x "
        f"{plan.gpus} {plan.machine.name}",
        "",
        f"{'module':<12}{'parameters':>16}{'trainable':>16}",
    ]
    for name, module in plan.model.named_children():
        counts = [sum(p.numel() for p in module.parameters() if p.requires_grad or every) for every in (1, 0)]
        lines.append(f"{name:<12}{counts[0]:>16,}{counts[1]:>16,}")
    lines.append(f"{'all':<12}{plan.parameters:>16,}{plan.trainable:>16,}")
    lines += [
        "",
        f"one image: forward {one.forward / 1e12:.3f} TFLOP, backward {one.backward / 1e12:.3f}, activations "
        f"{one.memory / GIB:.2f} GiB",
        "",
        f"{'ZeRO':<6}{'blocks':<14}{'states':>9}{'memory':>9}{'largest':>9}{'computation':>13}{'communication':>15}",
        f"{'':<6}{'':<14}{'GiB':>9}{'GiB':>9}{'batch':>9}{'s a step':>13}{'s a step':>15}",
    ]
    for choice in plan.choices:
        lines.append(_row(plan, choice))
    return "\n".join([*lines, "", *_verdict(plan, steps, batch)])


def _row(plan: Plan, choice: Choice) -> str:
    sizes = (plan.parameters, plan.trainable, plan.bytes_each, plan.moments, choice.stage, plan.gpus)
    blocks = "recomputed" if choice.checkpointing else "kept"
    mark = " <- the recipe" if choice is plan.own else ""
    return (
        f"{choice.stage:<6}{blocks:<14}{sum(states(*sizes)) / GIB:>9.2f}{choice.memory / GIB:>9.2f}"
        f"{choice.largest:>9}{choice.computation:>13.3f}{choice.communication:>15.3f}{mark}"
    )


def _verdict(plan: Plan, steps: int | None, batch: int) -> list[str]:
    best, own, room = plan.best(), plan.own, plan.machine.memory / GIB
    lines = []
    if not own.fits(plan.machine):
        lines.append(f"As it is, it does not fit: {own.memory / GIB:.1f} GiB of {room:.1f}.")
    if best is None:
        fewest = plan.fewest_gpus()
        if fewest is not None:
            lines.append(
                f"Nothing fits on {plan.gpus} GPUs; ZeRO-3 with recomputed blocks does from {fewest} on."
            )
        else:
            largest = max(choice.largest for choice in plan.choices)
            lines.append(
                f"No number of GPUs holds a micro-batch of {plan.micro_batch}; "
                + (f"{largest} is the most." if largest else "offload, or take a smaller canvas or model.")
            )
        return lines
    blocks = "recomputed" if best.checkpointing else "kept"
    if best is own:
        lines.append("The recipe is the quickest that fits.")
    else:
        lines.append(
            f"Take ZeRO-{best.stage} with blocks {blocks}: the quickest that fits, with the least memory."
        )
    low, high = max(best.computation, best.communication), best.seconds
    lines.append(
        f"A step takes {low:.3f} to {high:.3f} s at {100 * plan.efficiency:.0f}% of the peak and "
        f"{plan.bandwidth / 1e9:g} GB/s: {batch / high:,.0f} to {batch / low:,.0f} images/s."
    )
    if steps is not None:
        hours = [steps * seconds / 3600 for seconds in (low, high)]
        lines.append(
            f"{steps:,} steps: {hours[0]:.2f} to {hours[1]:.2f} hours, "
            f"{hours[0] * plan.gpus:,.0f} to {hours[1] * plan.gpus:,.0f} GPU-hours."
        )
    return lines


def machine_of(name: str, memory: float | None, tflops: float | None) -> Machine:
    """A known GPU, or one described by its numbers (GB, TFLOP/s). ValueError for neither."""
    known: Any = MACHINES.get(name.lower())
    if known is None and (memory is None or tflops is None):
        raise ValueError(
            f"unknown GPU '{name}'; known are {', '.join(MACHINES)}, or give --memory GB and --tflops"
        )
    known = known or Machine(name, 0.0, 0.0)
    return Machine(
        known.name, memory * 1e9 if memory else known.memory, tflops * 1e12 if tflops else known.flops
    )
