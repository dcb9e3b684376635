"""The kernel between the passes of CGBN, in Triton's interpreter against BatchNorm; compiled for GPUs.

As a script: `interpret FILE` runs the kernel and saves the results of all cases, `compile ARCH` prints the
resources of the compiled kernel.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from triton_offline import ARCHITECTURES, describe, only_compile, run_script

from giantdet.ops.statistics_triton import Moving, merge

EPS = 1e-5
# Number of values on each rank, and channels: one rank, ranks without values at either end, no values at all.
CASES = {"one": ([40], 64), "empty": ([0, 7, 130, 0], 300), "single": ([0, 1], 5), "none": ([0, 0], 5)}


def values_of(name: str) -> list[Tensor]:
    counts, channels = CASES[name]
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(count, channels, generator=generator) * 3 + 500 for count in counts]
    for part in values:
        part[:, 0] = 2.0  # a constant channel
    return values


def parts_of(name: str, constant: float) -> Tensor:
    """The ranks' rows as from `batch_norm_stats`, whose invstd of a constant channel is 0 or inf."""
    rows = []
    for part in values_of(name):
        count, channels = part.shape
        if not count:
            rows.append(torch.zeros(2 * channels + 1))
            continue
        invstd = part.double().var(0, unbiased=False).rsqrt()
        invstd[invstd.isinf()] = constant
        rows.append(torch.cat([part.double().mean(0), invstd, torch.tensor([float(count)])]).float())
    return torch.stack(rows)


def merged(name: str, constant: float) -> list[Tensor]:
    """Mean, invstd, count, and the updated running statistics."""
    channels = CASES[name][1]
    moving = Moving(torch.zeros(channels), torch.ones(channels), torch.tensor(0), 0.1)
    mean, invstd, count = merge(parts_of(name, constant), EPS, moving)
    fixed = merge(parts_of(name, constant), EPS, None)
    assert all(a.equal(b) for a, b in zip(fixed, (mean, invstd, count), strict=True))
    return [mean, invstd, count, *moving[:3]]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, float], list[Tensor]]:
    file = tmp_path_factory.mktemp("interpreted") / "results.pt"
    run_script(Path(__file__), "interpret", file, interpret=True)
    results: dict[tuple[str, float], list[Tensor]] = torch.load(file)
    return results


@pytest.mark.parametrize("constant", [0.0, float("inf")])
@pytest.mark.parametrize("name", ["one", "empty", "single"])
def test_equals_batch_norm_of_all_values(
    interpreted: dict[tuple[str, float], list[Tensor]], name: str, constant: float
) -> None:
    mean, invstd, count, running_mean, running_var, batches = interpreted[name, constant]
    values = torch.cat(values_of(name)).double()
    torch.testing.assert_close(mean.double(), values.mean(0), rtol=1e-6, atol=1e-6)
    expected = (values.var(0, unbiased=False) + EPS).rsqrt()
    torch.testing.assert_close(invstd.double(), expected, rtol=1e-5, atol=0)
    assert count.tolist() == [len(values)]
    stock = nn.BatchNorm1d(values.shape[1]).double()
    if len(values) > 1:
        stock(values)
        torch.testing.assert_close(running_var.double(), stock.running_var, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(running_mean.double(), stock.running_mean, rtol=1e-6, atol=1e-6)
    assert int(batches) == 1


def test_nothing_changes_without_values(interpreted: dict[tuple[str, float], list[Tensor]]) -> None:
    _, _, count, running_mean, running_var, batches = interpreted["none", 0.0]
    assert count.tolist() == [0] and int(batches) == 0
    assert running_mean.eq(0).all() and running_var.eq(1).all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_gpus(arch: int) -> None:
    found = json.loads(run_script(Path(__file__), "compile", str(arch)))
    assert [kernel["name"] for kernel in found] == ["_merge"] * 2
    assert all(kernel["arch"] == arch and kernel["spilled"] == 0 for kernel in found)


def compiled(arch: int) -> list[dict[str, Any]]:
    found = only_compile(arch)
    parts, channels = torch.zeros(8, 513), 256
    for moving in (None, Moving(torch.zeros(channels), torch.ones(channels), torch.tensor(0), 0.1)):
        merge(parts, EPS, moving)
    return [describe(kernel) for kernel in found]


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        cases = [(name, constant) for name in CASES for constant in (0.0, float("inf"))]
        torch.save({case: merged(*case) for case in cases}, sys.argv[2])
    else:
        print(json.dumps(compiled(int(sys.argv[2]))))
