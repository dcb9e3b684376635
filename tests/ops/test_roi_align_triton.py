"""The RoIAlign kernel in Triton's interpreter against torchvision; compiled for GPUs; as an operator.

As a script: `interpret FILE` runs the kernel and saves the results of all cases, `compile ARCH` prints the
resources of the compiled kernels.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

pytest.importorskip("triton")

from triton_offline import ARCHITECTURES, describe, only_compile, run_script

from giantdet.ops import roi_align, roi_align_triton, triton_kernels

STRIDES = (4.0, 8.0)
NAN, INF = float("nan"), float("inf")
INSIDE = [[3.0, 5, 30, 41], [10, 2, 14, 60], [20, 20, 23, 21], [0, 0, 40, 30]]
BORDERS = [[-40.0, -9, -8, 3], [-4, -4, 9, 68], [44, 60, 60, 80], [48, 64, 52, 72], [90, 90, 99, 99]]
# The last two differ from torchvision, see `test_boxes_that_are_not_finite_give_zeros`.
DEGENERATE = [[0.0, 0, 0, 0], [9, 9, 9, 30], [-4, 0, -4, 3], [NAN, 0, 9, 9], [0, 0, INF, 9]]


class Case(NamedTuple):
    boxes: list[list[float]]
    size: int
    sampling: int
    aligned: bool
    dtype: torch.dtype = torch.float32
    only_level: int | None = None


CASES = {
    "aligned": Case(INSIDE, 3, 2, True),
    "unaligned": Case(INSIDE, 3, 2, False),
    "one point": Case(INSIDE, 2, 1, True),
    "adaptive": Case(INSIDE, 2, 0, True),
    "adaptive, unaligned": Case(INSIDE, 2, 0, False),
    "borders": Case(BORDERS, 3, 2, True),
    "borders, unaligned": Case(BORDERS, 3, 2, False),
    "borders, adaptive": Case(BORDERS, 2, 0, True),
    "degenerate": Case(DEGENERATE, 2, 2, True),
    "degenerate, unaligned": Case(DEGENERATE, 2, 2, False),
    "degenerate, adaptive": Case(DEGENERATE, 2, 0, True),
    "bf16": Case(INSIDE, 2, 2, True, torch.bfloat16),
    "a level without boxes": Case(INSIDE, 2, 2, True, only_level=1),
    "no boxes": Case([], 2, 2, True),
}


def inputs(case: Case) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Return levels (one contiguous, one channels last), boxes, images, levels of boxes, output gradients."""
    generator = torch.Generator().manual_seed(1)
    levels = [torch.randn(2, 3, 16, 12, generator=generator), torch.randn(2, 3, 8, 6, generator=generator)]
    levels[1] = levels[1].contiguous(memory_format=torch.channels_last)
    boxes_K4 = torch.tensor(case.boxes).view(-1, 4)
    count = torch.arange(len(boxes_K4))
    level_K = count % 2 if case.only_level is None else torch.full_like(count, case.only_level)
    weight = torch.randn(len(boxes_K4), 3, case.size, case.size, generator=generator).to(case.dtype)
    levels = [level.to(case.dtype).requires_grad_() for level in levels]
    return levels, boxes_K4, count // 2 % 2, level_K, weight


def torchvisions(case: Case) -> tuple[Tensor, list[Tensor]]:
    """Return torchvision's features and gradients in float64, RoI by RoI; non-finite boxes give 0."""
    levels, boxes_K4, batch_K, level_K, weight = inputs(case)
    levels = [level.detach().double().requires_grad_() for level in levels]
    pooled = [torch.zeros(0, 3, case.size, case.size, dtype=torch.float64)]
    for box_4, image, level in zip(boxes_K4, batch_K.tolist(), level_K.tolist(), strict=True):
        box_4 = box_4 if box_4.isfinite().all() else torch.full_like(box_4, -1e4)
        roi = torch.cat([torch.tensor([float(image)]), box_4])[None].double()
        pooled.append(
            torchvision.ops.roi_align(
                levels[level], roi, case.size, 1 / STRIDES[level], case.sampling, case.aligned
            )
        )
    out = torch.cat(pooled) + 0 * sum(level.sum() for level in levels)
    return out, list(torch.autograd.grad(out, levels, weight.double()))


def kernels(case: Case) -> tuple[Tensor, list[Tensor]]:
    levels, boxes_K4, batch_K, level_K, weight = inputs(case)
    out = roi_align_triton.pool(
        levels, boxes_K4, batch_K, level_K, STRIDES, case.size, case.sampling, case.aligned
    )
    return out.detach(), list(torch.autograd.grad(out, levels, weight))


def check_operators() -> None:
    """Check each operator against its schema and its fake, and both with autograd's registration."""
    levels, boxes_K4, batch_K, level_K, weight = inputs(CASES["bf16"])
    boxes = boxes_K4[2:3], batch_K[2:3], level_K[2:3], STRIDES  # small, because the checks run many times
    torch.library.opcheck(torch.ops.giantdet.roi_align_pyramid.default, (levels, *boxes, 2, 1, True))
    torch.library.opcheck(
        torch.ops.giantdet.roi_align_pyramid_backward.default,
        (weight[2:3], *boxes, 2, [16, 8], [12, 6], 1, True),
    )


def check_compile() -> None:
    """Compile the whole function without a graph break, with gradients."""
    levels, boxes_K4, *_ = inputs(CASES["aligned"])

    def loss(levels: list[Tensor]) -> Tensor:
        return roi_align.roi_align_pyramid(levels, boxes_K4[1:3].view(2, 1, 4), STRIDES, 2, 1, True).sum()

    roi_align.use_triton = lambda device: True
    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(
        torch.autograd.grad(compiled_loss(levels), levels), torch.autograd.grad(loss(levels), levels)
    )


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, list[Tensor]]]:
    file = tmp_path_factory.mktemp("interpreted") / "results.pt"
    run_script(__file__, "interpret", file, interpret=True)
    results: dict[str, tuple[Tensor, list[Tensor]]] = torch.load(file)
    return results


@pytest.mark.parametrize("name", CASES)
def test_equal_torchvision(interpreted: dict[str, tuple[Tensor, list[Tensor]]], name: str) -> None:
    pooled, grads = interpreted[name]
    expected, expected_grads = torchvisions(CASES[name])
    assert pooled.dtype == grads[0].dtype == CASES[name].dtype
    # The interpreter truncates to bf16, whereas a GPU rounds.
    tolerance = 2**-7 if CASES[name].dtype == torch.bfloat16 else 2e-6
    assert_close(pooled.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    assert_close([g.double() for g in grads], expected_grads, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.boxes is DEGENERATE])
def test_boxes_that_are_not_finite_give_zeros(
    interpreted: dict[str, tuple[Tensor, list[Tensor]]], name: str
) -> None:
    assert (interpreted[name][0][-2:] == 0).all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_gpus(arch: int) -> None:
    """Compiled through the real call: 16-byte loads per thread, no spills; on sm_90 16-byte additions."""
    found = json.loads(run_script(__file__, "compile", str(arch)))
    assert [kernel["name"] for kernel in found] == ["_forward", "_backward"] * 3
    assert all(kernel["arch"] == arch and kernel["wide_loads"] for kernel in found)
    assert [kernel["spilled"] for kernel in found] == [0] * 6
    assert all(kernel["wide_additions"] for kernel in found if kernel["name"] == "_backward") == (arch >= 90)


def compiled(arch: int) -> list[dict[str, Any]]:
    found = only_compile(arch)
    for dtype, size, sampling in (
        (torch.bfloat16, 7, 2),
        (torch.bfloat16, 14, 0),
        (torch.float32, 14, 2),
    ):
        levels = [torch.zeros(2, 256, 64 // s, 96 // s, dtype=dtype).requires_grad_() for s in (1, 2, 4, 8)]
        zeros_K = torch.zeros(3, dtype=torch.int64)
        out = roi_align_triton.pool(
            levels, torch.zeros(3, 4), zeros_K, zeros_K, (4, 8, 16, 32), size, sampling, True
        )
        torch.autograd.grad(out, levels, torch.zeros_like(out))
    return [describe(kernel) for kernel in found]


def fake_pyramid() -> tuple[list[Tensor], Tensor]:
    levels = [torch.randn(2, 8, 64 // s, 96 // s, device="cuda", dtype=torch.bfloat16) for s in (1, 2)]
    return [level.requires_grad_() for level in levels], torch.rand(2, 5, 4, device="cuda")


def test_operator_on_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        levels, boxes = fake_pyramid()
        out = roi_align.roi_align_pyramid(levels, boxes, STRIDES, 7, 2, True)
        # Without autograd, whose engine needs a device.
        k = torch.zeros(10, dtype=torch.int64, device="cuda")
        sizes = [level.shape[2] for level in levels], [level.shape[3] for level in levels]
        contiguous = torch.empty_like(out, memory_format=torch.contiguous_format)
        grads = roi_align_triton.pool_backward(
            contiguous, boxes.view(-1, 4), k, k, STRIDES, 2, *sizes, 2, True
        )
    assert out.shape == (10, 8, 7, 7) and out.dtype == torch.bfloat16 and out.device.type == "cuda"
    assert out.is_contiguous(memory_format=torch.channels_last)
    for level, grad in zip(levels, grads, strict=True):
        assert grad.shape == level.shape and grad.dtype == level.dtype and grad.device == level.device
        assert grad.is_contiguous(memory_format=torch.channels_last)


def operators(monkeypatch: pytest.MonkeyPatch, **settings: bool) -> set[str]:
    """Return the names of the pooling operators that a call on CUDA reaches."""
    names: list[str] = []

    class Pool:
        @staticmethod
        def pool(levels: list[Tensor], *args: Any) -> Tensor:
            names.append("triton")
            return levels[0]

    def level_pool(levels: list[Tensor], *args: Any) -> Tensor:
        names.append("torchvision")
        return levels[0]

    monkeypatch.setattr(roi_align, "roi_align_triton", Pool)
    monkeypatch.setattr(roi_align, "_level_pool", level_pool)
    with FakeTensorMode():
        levels, boxes = fake_pyramid()
        roi_align.roi_align_pyramid(levels, boxes, STRIDES, 7, 2, True)
    return set(names)


def test_when_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators(monkeypatch) == {"triton"}
    torch.use_deterministic_algorithms(True)
    try:
        assert operators(monkeypatch) == {"torchvision"}
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(triton_kernels, "ENABLED", False)
    assert operators(monkeypatch) == {"torchvision"}


def test_package_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from giantdet.ops import nms, roi_align, triton_kernels\n"
        "assert not triton_kernels.INSTALLED and 'giantdet.ops.roi_align_triton' not in sys.modules"
    )
    run_script("-c", code)


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        torch.save({name: kernels(case) for name, case in CASES.items()}, sys.argv[2])
        check_operators()
        check_compile()
    else:
        print(json.dumps(compiled(int(sys.argv[2]))))
