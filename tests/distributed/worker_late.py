"""One rank of test_cli.py: rank 0 waits 3 seconds for rank 1, which arrives later."""

from __future__ import annotations

import argparse
import sys
import time

from giantdet import cli
from giantdet.commands import configs
from giantdet.distributed import comm


def _meet(options: argparse.Namespace) -> None:
    comm.start(timeout_minutes=0.05)
    comm.barrier()
    if comm.rank() == 1:
        time.sleep(6)
    else:
        comm.mean_over_ranks([1.0])


if __name__ == "__main__":
    configs.run = _meet  # any command will do
    sys.exit(cli.main(["configs"]))
