"""Failure handling in a run: stop signals, the launcher's death, losses and gradients that are not finite.

All ranks must decide alike, otherwise one waits in a collective forever. A signal may reach only one rank,
so the ranks exchange it at the end of a step. A loss that is not finite on one rank makes that rank's
gradients NaN; DeepSpeed sees it in the norm over all ranks and skips the step on all of them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
from pathlib import Path

import torch
from torch import Tensor

from giantdet.distributed import comm
from giantdet.distributed.engine import Engine
from giantdet.errors import DivergedError
from giantdet.layers.norm import moving_norms

logger = logging.getLogger("giantdet")

_PR_SET_PDEATHSIG = 1
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "torch/distributed", "slurmstepd")
_SHOWN = 16  # image ids in a message
_asked: list[str] = []


def listen() -> None:
    """Let SIGTERM, SIGUSR1 and Ctrl-C ask for a stop at the end of the step, in the process of a run.

    Without a launcher, a second Ctrl-C stops at once; launchers may send SIGINT more than once themselves.
    The launcher's death also sends SIGTERM: without a launcher nothing would ever end this process.
    """
    launched = False
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_text()
        launched = any(name in parent for name in _LAUNCHERS)
        if launched:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        logger.debug("not on Linux: the death of the launcher is not detected")

    def ask(number: int, _: object) -> None:
        _asked.append(signal.Signals(number).name)
        if number == signal.SIGINT and not launched:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\ngiantdet: stopping after this step; press Ctrl-C again to stop at once\n")

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, ask)


def stop_asked() -> bool:
    """Return whether any rank was asked to stop. All ranks call it."""
    return comm.any_rank(bool(_asked))


def stop_reason() -> str:
    """Return the name of the signal, the same on all ranks. All ranks call it."""
    heard = [name for names in comm.gather_objects(list(_asked)) for name in names]
    return str(comm.broadcast_object(heard[0] if heard else ""))


def poisoned(loss: Tensor) -> Tensor:
    """Return the loss; if it is not finite, its gradient is NaN everywhere, whatever those of its terms."""
    return loss * (loss.detach() - loss.detach() + 1.0)


class StepGuard:
    """Skips optimizer steps whose gradients are not finite, on all ranks together.

    DeepSpeed 0.19.8 does that at ZeRO-1 to 3 and in 16 bits; at stage 0 in float32 it is done here. The
    running statistics of batch norms, which the forward pass has updated already, are restored.

    Args:
        limit: the number of skipped steps in a row that ends the run.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        self.engine, self.limit = engine, limit
        self.skipped = self.in_a_row = 0
        self.statistics = [b for norm in moving_norms(engine.module) for b in norm.buffers(recurse=False)]
        self.kept = [b.clone() for b in self.statistics]
        self.is_plain = not hasattr(engine.optimizer, "_global_grad_norm")
        self.seen: list[tuple[Tensor, Tensor]] = []

    def watch(self, loss: Tensor, image_ids_B: Tensor) -> None:
        """Remember a micro-step's loss and images; called before its backward."""
        self.seen.append((loss.detach(), image_ids_B))

    @torch.no_grad()
    def step(self) -> bool:
        """Call `engine.step()`; return False if it should have changed the weights and did not.

        Raises DivergedError after too many skipped steps in a row. All ranks call it.
        """
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return True
        not_finite = self.is_plain and not self._is_finite()
        if not_finite:
            for p in self.engine.module.parameters():
                p.grad = None
        self.engine.step()
        if not_finite:
            self._count_as_skipped()
        applied = bool(self.engine.was_step_applied())
        if applied:
            self.in_a_row = 0
            if self.statistics:
                torch._foreach_copy_(self.kept, self.statistics)
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            if self.statistics:
                torch._foreach_copy_(self.statistics, self.kept)
            self._tell()
        self.seen.clear()
        return applied

    def _is_finite(self) -> bool:
        """Return whether the gradient of stage 0, whole and equal on all ranks, is finite."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())

    def _count_as_skipped(self) -> None:
        """Count the step as DeepSpeed counts those that it skips itself; the schedule does not advance."""
        engine = self.engine
        engine.skipped_steps += 1
        engine._step_applied = False
        if engine.lr_scheduler is not None:
            engine.lr_scheduler.go_to(engine.global_steps - engine.skipped_steps)

    def _tell(self) -> None:
        mine = [(float(loss), ids.tolist()) for loss, ids in self.seen]
        found = [entry for rank in comm.gather_objects(mine) for entry in rank]
        bad = [(loss, ids) for loss, ids in found if not torch.isfinite(torch.tensor(loss))]
        what = f"the loss is {bad[0][0]}" if bad else "a gradient is not finite"
        images = sorted({i for _, ids in bad or found for i in ids})
        shown = ", ".join(map(str, images[:_SHOWN])) + (", ..." if len(images) > _SHOWN else "")
        text = comm.broadcast_object(f"step {self.engine.global_steps} is skipped: {what} (images {shown})")
        if comm.is_main():
            logger.warning("%s; %d in a row, %d in all", text, self.in_a_row, self.skipped)
        if self.in_a_row >= self.limit:
            raise DivergedError(
                f"{self.in_a_row} steps in a row were skipped, the last: {text}: lower the learning rate, "
                "warm up longer, or look at these images; earlier checkpoints are intact"
            )
