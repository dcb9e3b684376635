"""One rank of whole runs: worker_train.py JSON [JSON ...] trains them one after the other.

A run that resumes saves what it has loaded at once, into the folder `again`: for a comparison.
"""

from __future__ import annotations

import sys

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
    train.__globals__["plot_run"] = lambda *_: []  # most of a short run's time; test_cli.py looks at pictures
    for path in sys.argv[1:]:
        train(load_run(path))
    comm.stop()
