"""Communication between ranks: on 2 and 4 real processes, and in a world of one that was never started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import launch_ok

from giantdet.distributed import comm


@pytest.mark.parametrize("world", [2, 4])
def test_between_processes(world: int) -> None:
    outputs = launch_ok(Path(__file__).with_name("worker_comm.py"), world)
    for rank, (_, out, _) in enumerate(outputs):
        line = next(line for line in out.splitlines() if line.startswith("RESULT "))
        found = json.loads(line.removeprefix("RESULT "))
        mean = sum(range(world)) / world
        assert found == {
            "rank": rank,
            "world": world,
            "main": rank == 0,
            "gathered": [{"rank": r, "rows": [r] * r} for r in range(world)] if rank == 0 else [],
            "broadcast": "from 0",
            "mean": [mean, 1.0],
            "none": False,
            "last": True,
            "averaged": [[mean, 1.0], 10 * mean, True],
        }


def test_in_a_world_of_one() -> None:
    assert (comm.rank(), comm.world_size(), comm.is_main()) == (0, 1, True)
    assert comm.gather_objects("a") == ["a"]
    assert comm.broadcast_object("a") == "a"
    assert comm.mean_over_ranks([1.0, 2.0]) == [1.0, 2.0]
    assert comm.any_rank(True) and not comm.any_rank(False)
    value = torch.tensor([1.0, 2.0])
    comm.average_([value])
    assert value.tolist() == [1.0, 2.0]
    comm.barrier()
