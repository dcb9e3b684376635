"""One rank of test_faults.py: runs in which rank 1 gets losses or gradients that are not finite.

worker_faults.py JSON:KIND:FIRST:LAST ...: in micro-steps FIRST to LAST of that run, counted from 1, rank 1's
loss is `nan` or `inf`, or only a `gradient` is not finite. The last run goes through the command line, whose
exit code is this script's.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from giantdet import cli
from giantdet.architectures.mask_rcnn import MaskRcnn
from giantdet.config.load import load_run
from giantdet.distributed import comm
from giantdet.engine import train

losses_of = MaskRcnn.losses


def corrupt(kind: str, first: int, last: int) -> None:
    """Patch the loss of micro-steps `first` to `last` of rank 1."""
    calls = 0

    def corrupted(model: MaskRcnn, predictions: Any, batch: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        losses = losses_of(model, predictions, batch)
        if comm.rank() == 1 and first <= calls <= last:
            if kind == "gradient":  # sqrt has an infinite derivative at 0, and inf * 0 is NaN
                losses["loss_cls"] = losses["loss_cls"] + (losses["loss_cls"] * 0.0).sqrt()
            else:
                losses["loss_cls"] = losses["loss_cls"] * 0.0 + float(kind)
        return losses

    MaskRcnn.losses = corrupted  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    *others, final = (argument.split(":") for argument in sys.argv[1:])
    for path, kind, first, last in others:
        corrupt(kind, int(first), int(last))
        train.train(load_run(path))
    path, kind, first, last = final
    corrupt(kind, int(first), int(last))
    sys.exit(cli.main(["train", "--config", path]))
