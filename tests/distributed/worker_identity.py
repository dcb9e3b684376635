"""One rank: worker_identity.py JSON [JSON ...] trains runs one after another and prints the refusals."""

from __future__ import annotations

import sys

import torch

from giantdet.config.load import load_run
from giantdet.distributed import comm
from giantdet.engine.train import train
from giantdet.errors import InputError

if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        try:
            scores = train(load_run(path))
            print("TRAINED", path, scores["box"]["AP"], flush=True)
        except InputError as error:
            print("REFUSED", path, error, flush=True)
    comm.stop()
