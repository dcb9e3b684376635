"""One rank of test_export.py: export_engine in one file and in several, at the run's ZeRO stage.

worker_export.py FOLDER JSON [JSON ...]; writes for each run FOLDER/NAME/{whole,sharded} and state.pt, the
state of the model before DeepSpeed partitioned it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from giantdet import export
from giantdet.architectures import build_model
from giantdet.config.classes import Classes
from giantdet.config.load import load_run
from giantdet.config.resolve import resolve
from giantdet.distributed import comm
from giantdet.engine import zero

SHAPES = Classes(objects=((1, "circle"), (3, "rectangle"), (4, "triangle"), (7, "star")))


def main() -> None:
    comm.start()
    torch.set_num_threads(1)
    for path in map(Path, sys.argv[2:]):
        run = resolve(load_run(path), comm.world_size(), 12, Classes.numbered(4), has_gpu=False)
        torch.manual_seed(0)
        model = build_model(run.giantdet.model, run.giantdet.data.size, run.giantdet.norm)
        folder = Path(sys.argv[1]) / path.stem
        config = export.export_config(run, SHAPES)
        if comm.is_main():
            folder.mkdir()
            torch.save({k: v.clone() for k, v in model.state_dict().items()}, folder / "state.pt")
        engine = zero.initialize(model, run)
        export.export_model(engine.module, folder / "whole", config)
        export.export_model(engine.module, folder / "sharded", config, shard=200_000 / 2**30)
        engine.destroy()
    comm.stop()


if __name__ == "__main__":
    main()
