"""One rank of test_plan.py: the bytes that DeepSpeed really keeps, and that a step really takes.

worker_plan.py OUT JSON ...: rank 0 writes {JSON's name: {weights, master, moments}} into OUT, in bytes per
rank, and the elements of a bucket; for a JSON named peak... the peak memory of a step beyond what is kept.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from worker_build import Peak, memory, release_freed_memory

from giantdet.architectures import total_loss
from giantdet.architectures.mask_rcnn import mask_rcnn_losses
from giantdet.config.classes import Classes
from giantdet.config.load import load_run
from giantdet.config.resolve import resolve
from giantdet.data.blank import blank_batch
from giantdet.distributed import comm
from giantdet.engine import zero


def nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def kept(engine: Any) -> dict[str, int]:
    parameters = list(engine.module.parameters())
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        weights, master = [p.ds_tensor for p in parameters], optimizer.fp32_partitioned_groups_flat
    else:
        weights = parameters
        master = getattr(optimizer, "single_partition_of_fp32_groups", [])
        if hasattr(optimizer, "fp32_groups"):
            master = [p for group in optimizer.fp32_groups for p in group]
    values = [v for state in engine.basic_optimizer.state.values() for v in state.values()]
    moments = [v for v in values if isinstance(v, torch.Tensor) and v.ndim > 0]
    return {"weights": nbytes(weights), "master": nbytes(master), "moments": nbytes(moments)}


def host_gradients(engine: Any) -> int:
    """Bytes of gradients that offload keeps, besides the float32 weights, for its optimizer on the CPU."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if not getattr(optimizer, "cpu_offload", False) and not getattr(optimizer, "offload_optimizer", False):
        return 0
    master = (
        optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    )
    return nbytes(p.grad for p in master if p.grad is not None)


def peak_of_a_step(run: Any, images: int) -> int:
    """Peak bytes of a plain model beyond weights and gradients; each gradient is dropped as it arrives."""
    release_freed_memory()
    model = zero.build(run, images).train()
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = blank_batch(run.giantdet.data, images, model.targets)

    def step() -> None:
        losses = mask_rcnn_losses(model(batch), run.giantdet.model.reference)
        total_loss(losses).backward()

    step()
    gc.collect()
    before, peak = memory(), Peak()
    peak.start()
    step()
    peak.done.set()
    peak.join()
    return peak.most - before


def main() -> None:
    out, *paths = map(Path, sys.argv[1:])
    comm.start()
    torch.set_num_threads(1)
    found = {}
    for path in paths:
        run = resolve(load_run(path), comm.world_size(), 100, Classes.numbered(4), has_gpu=False)
        images = run.deepspeed["train_micro_batch_size_per_gpu"]
        if path.stem.startswith("peak"):
            found[path.stem] = {"peak": peak_of_a_step(run, images)}
            continue
        engine = zero.initialize(zero.build(run, images), run)
        engine.train()
        losses = mask_rcnn_losses(
            engine(blank_batch(run.giantdet.data, images, engine.module.targets)),
            run.giantdet.model.reference,
        )
        engine.backward(total_loss(losses))
        engine.step()
        bucket = getattr(engine.optimizer, "reduce_bucket_size", 0)
        found[path.stem] = {"host_gradients": host_gradients(engine), "bucket": bucket, **kept(engine)}
        engine.destroy()
    if comm.is_main():
        out.write_text(json.dumps(found))
    comm.barrier()
    comm.stop()


if __name__ == "__main__":
    main()
