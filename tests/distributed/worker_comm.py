"""One rank of test_comm.py: calls every function of comm once and prints the results as JSON."""

from __future__ import annotations

import json

import torch

from giantdet.distributed import comm

if __name__ == "__main__":
    comm.start()
    rank = comm.rank()
    thirds = torch.full((3,), 1 / 3)
    mixed = [torch.tensor([float(rank), 1.0]), torch.tensor(10.0 * rank), thirds]
    comm.average_(mixed)
    found = {
        "rank": rank,
        "world": comm.world_size(),
        "main": comm.is_main(),
        "gathered": comm.gather_objects({"rank": rank, "rows": [rank] * rank}),
        "broadcast": comm.broadcast_object(f"from {rank}"),
        "mean": comm.mean_over_ranks([float(rank), 1.0]),
        "none": comm.any_rank(False),
        "last": comm.any_rank(rank == comm.world_size() - 1),
        "averaged": [mixed[0].tolist(), mixed[1].item(), bool((thirds == torch.full((3,), 1 / 3)).all())],
    }
    comm.barrier()
    print("RESULT " + json.dumps(found))
    comm.stop()
    assert comm.world_size() == 1 and comm.is_main()
