"""Estimate what a run needs on a cluster, before it starts: memory per rank, communication and time per step.

Weights, optimizer states and gradients follow from the number of parameters, the precision and the ZeRO
stage; activations and FLOPs are counted (`count.py`); communication is that of ring collectives. The time of
a step is computation at a stated fraction of the GPU's peak, and communication at a stated bandwidth.
DeepSpeed overlaps part of the two, so a step takes between the longer one and their sum.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from giantdet.config.load import RunConfig
from giantdet.config.resolve import resolve
from giantdet.config.resolved import ResolvedRun
from giantdet.engine.zero import weight_dtype
from giantdet.errors import ConfigError
from giantdet.layers.norm import check_norms
from giantdet.tools.costs import (
    GIB,
    RESERVE,
    States,
    agvm_traffic,
    buffers,
    cgbn_traffic,
    offloads,
    persistent,
    states,
    traffic,
)
from giantdet.tools.count import Count, count, meta_model, with_assumed_classes
from giantdet.tools.machines import Machine


class Choice(NamedTuple):
    """One configuration of a run, with its memory, its largest micro-batch and the time of its step."""

    stage: int
    every: int
    """Every `every`-th block is recomputed; 0: none."""
    offload: bool
    """True if the optimizer states are in CPU memory."""
    memory: float
    """Bytes of GPU memory per rank."""
    host: float
    """Bytes of CPU memory per rank."""
    largest: int
    """Largest micro-batch that fits, in images; 0: none."""
    computation: float
    """Seconds per step."""
    communication: float
    """Seconds per step."""

    @property
    def seconds(self) -> float:
        """Seconds per step without any overlap."""
        return self.computation + self.communication

    def fits(self, machine: Machine) -> bool:
        return self.memory <= machine.memory


def with_recompute(run: ResolvedRun, every: int) -> ResolvedRun:
    """Return the run with every `every`-th block recomputed, 0 for none, and no block compiled."""
    update = {"checkpoint_blocks": every, "compile_blocks": False}
    backbone = run.giantdet.model.backbone.model_copy(update=update)
    model = run.giantdet.model.model_copy(update={"backbone": backbone})
    return replace(run, giantdet=run.giantdet.model_copy(update={"model": model}))


class Plan:
    """The estimates for a resolved run on `gpus` GPUs, for its own configuration and for alternatives.

    `bandwidth` is in bytes per second and GPU; `efficiency` is the fraction of the GPU's peak that is
    reached.
    """

    def __init__(
        self, run: ResolvedRun, gpus: int, machine: Machine, bandwidth: float, efficiency: float
    ) -> None:
        self.run, self.gpus, self.machine = run, gpus, machine
        self.bandwidth, self.efficiency = bandwidth, efficiency
        self.model = meta_model(run)
        self.frozen = self.model.backbone.frozen
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.bytes_each = weight_dtype(run).itemsize
        self.moments = run.optimizer.MOMENTS
        _, self.micro_batch, self.accumulation = run.batch
        self.persistent = persistent(run, self.model)
        self.counts = {every: self._count(every) for every in self._recompute_choices()}
        self.choices = self._choices(offloads(run))
        self.own = next(
            choice
            for choice in self.choices
            if choice.stage == run.stage
            and choice.every == (0 if self.frozen else int(run.giantdet.model.backbone.checkpoint_blocks))
        )

    def _recompute_choices(self) -> list[int]:
        """Return the recompute settings to compare: no block, as the run says, and all blocks.

        It is the run's own setting alone where the blocks of the backbone are not known, and none where the
        backbone is frozen, which keeps no activations.
        """
        if self.frozen:
            return [0]
        wanted = int(self.run.giantdet.model.backbone.checkpoint_blocks)
        try:
            meta_model(with_recompute(self.run, 1))
        except ValueError:
            return [wanted]
        return sorted({0, wanted, 1}, key=lambda every: -every if every else -math.inf)

    def _count(self, every: int) -> tuple[Count, Count]:
        run = with_recompute(self.run, every)
        return count(run, 1), count(run, 2)

    def _choices(self, offload: bool) -> list[Choice]:
        return [self._choice(stage, every, offload) for every in self.counts for stage in range(4)]

    def activations(self, every: int, images: int) -> float:
        """Return the bytes of activations for a micro-batch, extrapolated from those for 1 and 2 images."""
        one, two = self.counts[every]
        return one.memory + (images - 1) * (two.memory - one.memory)

    def states(self, stage: int, ranks: int | None = None) -> States:
        """Return the states of one rank, on the GPU or offloaded."""
        return states(
            self.parameters, self.trainable, self.bytes_each, self.moments, stage, ranks or self.gpus
        )

    def on_host(self, stage: int, offload: bool, ranks: int | None = None) -> float:
        """Return the bytes per rank that DeepSpeed keeps in CPU memory.

        These are float32 weights, moments and, where gradients are partitioned, float32 gradients. Stage 0
        has no offload.
        """
        if not offload or stage == 0:
            return 0.0
        held = self.states(stage, ranks)
        return held.master + held.moments + (held.master if stage >= 2 else 0.0)

    def fixed(self, stage: int, offload: bool, ranks: int | None = None) -> float:
        """Return the bytes of GPU memory per rank that do not depend on the micro-batch."""
        held = self.states(stage, ranks)
        total = held.weights + held.gradients + held.master + held.moments
        if offload and stage:
            total -= held.master + held.moments + (held.gradients if stage >= 2 else 0.0)
        if stage == 3:
            total += self.persistent * self.bytes_each
        return total + buffers(self.run, self.parameters, self.trainable, self.bytes_each, stage) + RESERVE

    def _choice(self, stage: int, every: int, offload: bool) -> Choice:
        one, two = self.counts[every]
        fixed = self.fixed(stage, offload)
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
            every > 0,
        )
        sent += agvm_traffic(self.run, self.model, self.trainable, self.gpus, self.accumulation)
        sent += self.accumulation * cgbn_traffic(self.run, self.model, self.gpus)
        return Choice(
            stage,
            every,
            offload and stage > 0,
            memory=fixed + self.activations(every, self.micro_batch),
            host=self.on_host(stage, offload),
            largest=1 + math.floor(room / each) if room >= 0 else 0,
            computation=flops / (self.machine.flops * self.efficiency),
            communication=sent / self.bandwidth if self.gpus > 1 else 0.0,
        )

    def with_offload(self) -> Choice | None:
        """Return the fastest choice that fits with the optimizer states in CPU memory, or None.

        It is None also if the run itself offloads them. Its time does not include the optimizer step on the
        CPU.
        """
        if offloads(self.run):
            return None
        return quickest(self._choices(True), self.machine)

    def blocks(self, choice: Choice) -> str:
        """Return in words what happens to the activations of the backbone's blocks."""
        return "frozen" if self.frozen else blocks_text(choice.every)

    def best(self) -> Choice | None:
        return quickest(self.choices, self.machine)

    def fewest_gpus(self) -> int | None:
        """Return the smallest number of GPUs on which the run's micro-batch fits; None: it never fits.

        This is at ZeRO-3, with all blocks recomputed.
        """
        held, offload = self.activations(list(self.counts)[-1], self.micro_batch), offloads(self.run)
        if self.fixed(3, offload, 10**9) + held > self.machine.memory:
            return None
        gpus = 1
        while self.fixed(3, offload, gpus) + held > self.machine.memory:
            gpus += 1
        return gpus


def quickest(choices: list[Choice], machine: Machine) -> Choice | None:
    """Return the fastest choice that fits, or None.

    Of the choices within 2% of its time, it is the one that needs the least memory.
    """
    fitting = [choice for choice in choices if choice.fits(machine)]
    best = min((c.seconds for c in fitting), default=0.0)
    near = [choice for choice in fitting if choice.seconds <= 1.02 * best]
    return min(near, key=lambda choice: choice.memory, default=None)


def make_plan(
    run: RunConfig, gpus: int, machine: Machine, bandwidth: float, efficiency: float, images: int
) -> Plan:
    """Return the plan of an unresolved run; `images` is the size of the training set.

    Raises ConfigError where the batch size does not fit the number of GPUs.
    """
    try:
        resolved = resolve(with_assumed_classes(run), gpus, images)
        check_norms(resolved.giantdet.norm, resolved.batch.micro, gpus)
    except ConfigError as error:
        raise ConfigError(f"{gpus} GPUs: {error}") from None
    return Plan(resolved, gpus, machine, bandwidth, efficiency)


def report(plan: Plan) -> str:
    """Return the plan as text."""
    run, batch = plan.run, plan.run.batch.total
    steps = run.giantdet.train.steps
    one, _ = plan.counts[plan.own.every]
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
        f"{'':<6}{'':<14}{'GiB':>9}{'GiB':>9}{'batch':>9}{'s/step':>13}{'s/step':>15}",
    ]
    for choice in plan.choices:
        lines.append(_row(plan, choice))
    return "\n".join([*lines, "", *_verdict(plan, steps, batch)])


def _row(plan: Plan, choice: Choice) -> str:
    mark = " <- the recipe" if choice is plan.own else ""
    return (
        f"{choice.stage:<6}{plan.blocks(choice):<14}{sum(plan.states(choice.stage)) / GIB:>9.2f}"
        f"{choice.memory / GIB:>9.2f}{choice.largest:>9}{choice.computation:>13.3f}"
        f"{choice.communication:>15.3f}{mark}"
    )


def blocks_text(every: int) -> str:
    """Return in words how many of the backbone's blocks are recomputed."""
    return {0: "kept", 1: "recomputed"}.get(every, f"1 in {every} rec.")


def _verdict(plan: Plan, steps: int | None, batch: int) -> list[str]:
    best, own, room = plan.best(), plan.own, plan.machine.memory / GIB
    lines = []
    if not own.fits(plan.machine):
        lines.append(f"The recipe does not fit: it needs {own.memory / GIB:.1f} GiB of {room:.1f} GiB.")
    if own.offload:
        lines.append(
            f"Offload keeps {own.host / GIB:.1f} GiB of each GPU's states in CPU memory; these times do "
            "not include the optimizer step on the CPU."
        )
    if best is None:
        other, fewest = plan.with_offload(), plan.fewest_gpus()
        if other is not None:
            lines.append(
                "Nothing fits with the optimizer states on the GPU. With offload_optimizer, "
                f"ZeRO-{other.stage} with blocks {plan.blocks(other)} fits: "
                f"{other.memory / GIB:.1f} GiB, and {other.host / GIB:.1f} GiB of CPU memory, per GPU."
            )
        if fewest is not None:
            lines.append(
                f"Nothing fits on {plan.gpus} GPUs; ZeRO-3 with {'frozen' if plan.frozen else 'recomputed'} "
                f"blocks fits on {fewest} or more."
            )
        else:
            largest = max(choice.largest for choice in plan.choices)
            lines.append(
                f"No number of GPUs is enough for a micro-batch of {plan.micro_batch}; "
                + (f"the largest is {largest}." if largest else "offload, or use a smaller canvas or model.")
            )
        return lines
    if best is own:
        lines.append("The recipe is the fastest that fits.")
    else:
        lines.append(
            f"Take ZeRO-{best.stage} with blocks {plan.blocks(best)}: the fastest that fits, with the "
            "least memory."
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
