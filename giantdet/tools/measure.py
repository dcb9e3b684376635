"""Find the largest micro-batch of this machine by trying: `giantdet plan --measure`.

Every try runs in new processes, one per GPU, so that running out of memory ends only that try. A try is two
whole optimizer steps, including AGVM's measurement, on images of noise without objects. Shapes are fixed, so
the content of the images does not change what is allocated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from giantdet.architectures import total_loss
from giantdet.config.load import load_run
from giantdet.config.resolve import resolve
from giantdet.config.resolved import ResolvedRun
from giantdet.data.blank import blank_batch
from giantdet.distributed import comm
from giantdet.engine import zero
from giantdet.optim.agvm import Agvm
from giantdet.tools.costs import GIB
from giantdet.tools.count import with_assumed_classes

STEPS = 2
OUT_OF_MEMORY = 75
KILLED = (-9, 137)  # exit codes of a process that the operating system kills for its use of memory
LIMIT = 4096


class Try(NamedTuple):
    """The result of trying one micro-batch."""

    images: int
    fits: bool
    memory: float
    """Peak bytes of the GPU, or of the process; 0 if the micro-batch did not fit."""


def measure(
    path: Path, overrides: list[str], ranks: int, memory: float | None, say: Callable[[str], None]
) -> int:
    """Return the largest micro-batch, in images, of the run on `ranks` processes of this machine; 0: none
    fits.

    `memory` limits the bytes per rank that a try may allocate. `say` prints the result of each try. Raises
    RuntimeError where a try fails for a reason other than memory.
    """

    def fits(images: int) -> bool:
        tried = start(path, overrides, ranks, memory, images)
        found = f"{tried.memory / GIB:.2f} GiB" if tried.fits else "out of memory"
        say(f"  {images} image{'s' * (images > 1)} per rank: {found}")
        return tried.fits

    return largest(fits)


def largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, found by doubling and bisection; it is less than 2 x LIMIT.

    All numbers below one that fits must fit too.
    """
    good, bad = 0, 1
    while bad <= LIMIT and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def start(path: Path, overrides: list[str], ranks: int, memory: float | None, images: int) -> Try:
    """Try one micro-batch in new processes."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "memory.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        arguments = [str(path), str(answer), str(images), str(memory or 0.0), *overrides]
        command = [sys.executable, *launcher, "-m", "giantdet.tools.measure", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode == 0:
            return Try(images, True, float(json.loads(answer.read_text())))
        codes = {str(code) for code in (OUT_OF_MEMORY, *KILLED)}
        if any(f"exitcode  : {code} " in ended.stderr for code in codes):
            return Try(images, False, 0.0)
        raise RuntimeError(f"a micro-batch of {images} could not be tried:\n{ended.stderr[-4000:]}")


def run_with(path: Path, overrides: list[str], images: int, world: int) -> ResolvedRun:
    """Return the run with a micro-batch of `images`, and without data and pretrained weights.

    A single process accumulates two micro-steps, because AGVM needs two shards; several processes do one.
    """
    micro_steps = 2 if world == 1 else 1
    fixed = [
        "train_batch_size=auto",
        f"train_micro_batch_size_per_gpu={images}",
        f"gradient_accumulation_steps={micro_steps}",
        "model.backbone.pretrained=false",
        "agvm.start_step=0",
        "agvm.interval=1",
    ]
    run = with_assumed_classes(load_run(path, [*overrides, *fixed]))
    return resolve(run, world, 10**6, has_gpu=torch.cuda.is_available())


def steps(run: ResolvedRun, device: torch.device) -> None:
    """Run STEPS whole optimizer steps, as in training."""
    images = run.batch.micro
    model = zero.build(run, images)
    engine = zero.initialize(model, run)
    engine.train()
    agvm = Agvm(engine, run.giantdet.agvm) if run.giantdet.agvm.enabled else None
    batch = blank_batch(run.giantdet.data, images, model.targets).to(device)
    for _ in range(STEPS * run.batch.accumulation):
        engine.backward(total_loss(model.losses(engine(batch), batch)))
        if agvm is not None:
            agvm.observe()
            agvm.scale()
        engine.step()


def bound(memory: float, device: torch.device) -> None:
    """Limit what this process may allocate to `memory` bytes, of its GPU or, without one, of CPU memory."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), device)
        return
    import resource

    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(memory), resource.RLIM_INFINITY))


def main(arguments: list[str]) -> int:
    """Run one rank of a try and return its exit code; arguments: JSON ANSWER IMAGES MEMORY override ..."""
    path, answer, images, memory, *overrides = arguments
    device = comm.start()
    run = run_with(Path(path), overrides, int(images), comm.world_size())
    if float(memory):
        bound(float(memory), device)
    try:
        steps(run, device)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
            return OUT_OF_MEMORY
        raise
    peak = max(comm.gather_objects(zero.peak_memory(device) * GIB), default=0.0)
    if comm.is_main():
        Path(answer).write_text(json.dumps(peak))
    comm.barrier()
    comm.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
