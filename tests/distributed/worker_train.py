"""One rank of whole runs: worker_train.py JSON [JSON ...] trains them one after the other."""

from __future__ import annotations

import sys

import torch

from giantdet.config.load import load_run
from giantdet.distributed import comm
from giantdet.engine.train import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        train(load_run(path))
    comm.stop()
