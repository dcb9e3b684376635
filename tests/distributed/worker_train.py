"""One rank of whole runs: worker_train.py JSON [JSON ...] trains them one after the other.

A run that resumes saves the loaded state at once, into the folder `again`, for a comparison.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from giantdet.checkpoint.saver import Checkpoints
from giantdet.config.load import load_run
from giantdet.distributed import comm
from giantdet.engine.train import train


class Observed(Checkpoints):
    def resume(self) -> int:
        step = super().resume()
        if step:
            again = self.folder.parent / "again"
            copy = Checkpoints(self.engine, again, self.config, self.agvm, self.ema)
            copy.save(step)
            copy.close()
        return step


if __name__ == "__main__":
    torch.set_num_threads(1)
    train.__globals__["Checkpoints"] = Observed
    train.__globals__["plot_run"] = lambda *_: []  # takes most of a short run; test_cli.py checks the plots
    stages = set()
    for path in sys.argv[1:]:
        run = load_run(path)
        stages.add(run.deepspeed.get("zero_optimization", {}).get("stage", 0))
        train(run)
    comm.stop()
    # A gloo thread that outlives the interpreter can abort the process at its exit. At ZeRO-3 caches of
    # DeepSpeed 0.19 keep the model and its groups.
    threads = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert 3 in stages or not [name for name in threads if "gloo" in name], threads
