"""One rank: worker_bad_data.py RUN RUN trains the first run, then the second through the command line."""

from __future__ import annotations

import sys

import torch

from giantdet import cli
from giantdet.config.load import load_run
from giantdet.engine.train import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    train(load_run(sys.argv[1]))
    sys.exit(cli.main(["train", "--config", sys.argv[2]]))
