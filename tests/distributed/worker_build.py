"""One rank of test_build.py: the memory of a process while a model is partitioned by ZeRO-3.

worker_build.py JSON WEIGHTS OUT: builds and partitions the run's detector; rank 0 writes OUT with the bytes
of the whole model and of the largest weight, and the peak memory of any rank beyond its memory at the start.
Unless WEIGHTS is "-", OUT also lists the weights that differ from this file.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import threading
from pathlib import Path

import deepspeed
import torch
from safetensors import safe_open

from giantdet.architectures.mask_rcnn import MaskRcnn
from giantdet.config.classes import Classes
from giantdet.config.load import RunConfig, load_run
from giantdet.config.resolve import resolve
from giantdet.distributed import comm
from giantdet.engine import zero
from giantdet.layers.deferred import is_deferred

WARM_UP = ["model.backbone.name=test_vit", "model.backbone.init_weights=null"]

M_MMAP_THRESHOLD = -3


def memory() -> int:
    """Bytes of this process, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def release_freed_memory() -> None:
    """Make glibc return large blocks at once, so that the process's memory is what is in use."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)


class Peak(threading.Thread):
    """Samples the memory every millisecond and keeps the maximum."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.001):
            self.most = max(self.most, memory())


def build(run: RunConfig) -> tuple[MaskRcnn, int]:
    """Return the model, partitioned if possible, and how many of its weights were created one by one."""
    model = zero.build(run, 1)
    deferred = sum(is_deferred(p) for p in model.parameters())
    if deferred or run.deepspeed["zero_optimization"]["stage"] == 3:
        zero.partition(model, run)
    return model, deferred


def main() -> None:
    path, weights, out = sys.argv[1:]
    comm.start()
    release_freed_memory()
    torch.set_num_threads(1)
    run = resolve(load_run(path), comm.world_size(), 100, Classes.numbered(4), has_gpu=False)
    # A small model first: imports and caches must not count as the model's memory.
    build(resolve(load_run(path, WARM_UP), comm.world_size(), 100, Classes.numbered(4), has_gpu=False))
    gc.collect()
    before, peak = memory(), Peak()
    peak.start()
    model, deferred = build(run)
    gc.collect()
    after = memory()
    peak.done.set()
    peak.join()

    parameters = dict(model.named_parameters())
    sizes = [4 * getattr(p, "ds_numel", p.numel()) for p in parameters.values()]
    wrong = []
    if weights != "-":
        with safe_open(weights, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                p = parameters[f"backbone.body.{name}"]
                with deepspeed.zero.GatheredParameters([p]):
                    if not torch.equal(p.detach(), file.get_tensor(name)):
                        wrong.append(name)
    found = comm.gather_objects((peak.most - before, after - before))
    if comm.is_main():
        result = {"whole": sum(sizes), "largest": max(sizes), "deferred": deferred, "wrong": wrong}
        result |= {"peak": max(p for p, _ in found), "after": max(a for _, a in found)}
        Path(out).write_text(json.dumps(result))
    comm.barrier()
    comm.stop()


if __name__ == "__main__":
    main()
