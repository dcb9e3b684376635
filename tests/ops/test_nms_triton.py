"""The NMS kernels in Triton's interpreter against torchvision's greedy NMS; compiled for GPUs.

As a script: `interpret FILE` runs the kernels and saves the results of all cases, `compile ARCH` prints the
resources of the compiled kernels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

pytest.importorskip("triton")

from triton_offline import ARCHITECTURES, describe, only_compile, run_script

from giantdet.ops import nms, nms_triton

# Sizes around a word of 32 boxes and a block of 64 rows; the last is a chain.
COUNTS = (1, 31, 32, 33, 65, 130, 200)
THRESHOLD = 0.5


def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    if count == COUNTS[-1]:
        # Box i overlaps only i + 1: 200 decisions, each of which depends on the one before.
        left = torch.arange(float(count)) * 3
        boxes = torch.stack([left, torch.zeros(count), left + 10, torch.full((count,), 10.0)], dim=1)[None]
        return boxes, torch.linspace(1, 0.1, count)[None], torch.ones(1, count, dtype=torch.bool)
    corner = torch.rand(2, count, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + torch.rand(2, count, 2, generator=generator) * 30], dim=-1)
    boxes[0, : count // 4] = boxes[0, :1]  # duplicates of one box
    boxes[1, : count // 8, 2:] = boxes[1, : count // 8, :2]  # zero area
    boxes[1, -1] = float("nan")
    # Rounded to two digits: of equal scores the earlier box wins.
    scores = (torch.rand(2, count, generator=generator) * 100).round() / 100
    valid = torch.rand(2, count, generator=generator) < 0.8
    valid[1, -1] = False
    return boxes, scores, valid


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Tensor]:
    file = tmp_path_factory.mktemp("interpreted") / "results.pt"
    run_script(Path(__file__), "interpret", file, interpret=True)
    results: dict[int, Tensor] = torch.load(file)
    return results


@pytest.mark.parametrize("count", COUNTS)
def test_equal_torchvision(interpreted: dict[int, Tensor], count: int) -> None:
    boxes, scores, valid = inputs(count)
    for group, keep in enumerate(interpreted[count]):
        slots = valid[group].nonzero()[:, 0]
        kept = torchvision.ops.nms(boxes[group, slots], scores[group, slots], THRESHOLD)
        assert keep.equal(torch.zeros(count, dtype=torch.bool).index_fill(0, slots[kept], True))


def test_no_boxes(interpreted: dict[int, Tensor]) -> None:
    assert interpreted[0].shape == (2, 0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_gpus(arch: int) -> None:
    found = json.loads(run_script(Path(__file__), "compile", str(arch)))
    assert [kernel["name"] for kernel in found] == ["_pack_overlaps", "_scan"] * 2
    assert all(kernel["arch"] == arch and kernel["spilled"] == 0 for kernel in found)


def compiled(arch: int) -> list[dict[str, Any]]:
    found = only_compile(arch)
    for count in (2000, 5000):
        nms_triton.keep_sorted(torch.zeros(2, count, 4), torch.ones(2, count, dtype=torch.bool), THRESHOLD)
    return [describe(kernel) for kernel in found]


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        results = {count: nms.nms_mask_triton(*inputs(count), THRESHOLD) for count in COUNTS}
        empty = torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)
        torch.save(results | {0: nms.nms_mask_triton(*empty, THRESHOLD)}, sys.argv[2])
    else:
        print(json.dumps(compiled(int(sys.argv[2]))))
