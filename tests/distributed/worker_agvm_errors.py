"""Settings that AGVM refuses, in one process; prints one message a line."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

from giantdet.config.types import AgvmConfig
from giantdet.distributed import comm
from giantdet.optim.agvm import Agvm
from giantdet.optim.param_groups import parameter_groups


def refuse(accumulation: int, named: bool = True, **settings: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    groups = parameter_groups(model, 0.0, 0.1) if named else list(model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    try:
        Agvm(engine, AgvmConfig(enabled=True, start_step=0, **{"anchor": "0", **settings}))
    except ValueError as error:
        print("REFUSED", error, flush=True)
    engine.destroy()


if __name__ == "__main__":
    comm.start()
    torch.set_num_threads(1)
    refuse(1)
    refuse(3)
    refuse(2, anchor="backbone")
    refuse(2, named=False)
    refuse(2, modules={"one": ("0.*",)})
    refuse(2, clamp=(10.0, 0.5))
    refuse(3, estimator="all_splits")  # valid
    refuse(2)  # valid
    comm.stop()
