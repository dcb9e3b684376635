"""One rank of test_cgbn.py: CGBN against torch's BatchNorm over the concatenated batch.

Prints `PASSED name` after each case. Ranks differ in their numbers of images and in the images' sizes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from giantdet.distributed import comm
from giantdet.layers.cgbn import CrossGpuBatchNorm, cgbn_group, convert_batchnorm
from giantdet.ops.statistics import merge_statistics

CHANNELS = 6
STEPS = 3


@dataclass(frozen=True)
class Case:
    """Rank r has `images[r % 4]` images of `sizes[r % 4]`."""

    name: str
    norm: Any = nn.BatchNorm2d
    options: dict[str, Any] = field(default_factory=dict)
    images: tuple[int, ...] = (2, 2, 2, 2)
    sizes: tuple[tuple[int, ...], ...] = ((5, 7),) * 4
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5
    channels_last: bool = False
    evaluation: bool = False
    autocast: bool = False
    mean: float = 0.5


SIZES = ((5, 7), (3, 4), (8, 2), (1, 1))
DOUBLE: dict[str, Any] = {"dtype": torch.float64, "tolerance": 1e-10}
CASES = [
    Case("float32"),
    Case("float64", **DOUBLE),
    Case("numbers of images", images=(1, 3, 2, 4)),
    Case("sizes of images", images=(1, 3, 2, 4), sizes=SIZES),
    Case("image sizes in float64", images=(1, 3, 2, 4), sizes=SIZES, **DOUBLE),
    Case("first rank empty", images=(0, 3, 2, 1), sizes=SIZES),
    Case("last rank empty", images=(2, 0, 1, 0), sizes=SIZES, **DOUBLE),
    Case("channels last", images=(1, 3, 2, 4), sizes=SIZES, channels_last=True),
    Case("channels last, one empty", images=(2, 0, 1, 0), sizes=SIZES, channels_last=True, **DOUBLE),
    Case("autocast", images=(1, 3, 2, 4), sizes=SIZES, autocast=True),
    Case("1d vectors", norm=nn.BatchNorm1d, sizes=((),) * 4, images=(4, 1, 3, 2)),
    Case("1d sequences", norm=nn.BatchNorm1d, sizes=((9,), (4,), (5,), (2,))),
    Case("3d", norm=nn.BatchNorm3d, sizes=((2, 3, 4), (1, 5, 2), (3, 3, 3), (2, 2, 2))),
    Case("3d channels last", norm=nn.BatchNorm3d, sizes=((2, 3, 4),) * 4, channels_last=True),
    Case("BatchNormAct2d", norm=BatchNormAct2d, options={"act_layer": nn.SiLU}, images=(2, 0, 1, 3)),
    Case("cumulative average", options={"momentum": None}, images=(1, 3, 2, 4), sizes=SIZES),
    Case("momentum 0.3, eps 0.1", options={"momentum": 0.3, "eps": 0.1}),
    Case("no affine", options={"affine": False}, images=(1, 3, 2, 4)),
    Case("no affine in float64", options={"affine": False}, sizes=SIZES, **DOUBLE),
    Case("no running statistics", options={"track_running_stats": False}, images=(1, 3, 2, 4)),
    Case("evaluation", evaluation=True, images=(1, 3, 2, 4), sizes=SIZES),
    Case("evaluation without running statistics", evaluation=True, options={"track_running_stats": False}),
    Case("mean 1e4, variance 1", mean=1e4, tolerance=3e-3, sizes=((16, 16),) * 4, images=(1, 3, 2, 4)),
]


def make(case: Case) -> nn.Module:
    norm = case.norm(CHANNELS, **case.options).to(case.dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())]:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return norm.train(not case.evaluation)


def inputs(case: Case, world: int, step: int) -> tuple[list[Tensor], list[Tensor]]:
    """The input of each rank and the gradient of its output. Channels have different scales."""
    generator = torch.Generator().manual_seed(10 + step)
    xs, probes = [], []
    for r in range(world):
        shape = (case.images[r], CHANNELS, *case.sizes[r])
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if case.mean < 100:
            x = x * torch.arange(1, CHANNELS + 1).view(-1, *[1] * len(case.sizes[r])) + 0.1 * r
        x = (x + case.mean).to(torch.bfloat16 if case.autocast else case.dtype)
        probe = torch.randn(shape, generator=generator, dtype=torch.float64).to(x.dtype)
        if case.channels_last:
            memory = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            x, probe = x.contiguous(memory_format=memory), probe.contiguous(memory_format=memory)
        xs.append(x)
        probes.append(probe)
    return xs, probes


def joined(tensors: list[Tensor]) -> Tensor:
    """All values of all ranks as one batch, [1, C, values, (1)]: sizes may differ from rank to rank."""
    values = torch.cat([t.transpose(0, 1).flatten(1) for t in tensors], 1)[None]
    return values[..., None]


def of_rank(whole: Tensor, parts: list[Tensor], rank: int) -> Tensor:
    """Return one rank's part: the inverse of `joined`."""
    counts = [t.numel() // CHANNELS for t in parts]
    mine, part = whole[0, :, :, 0].split(counts, 1)[rank], parts[rank]
    return mine.reshape(CHANNELS, part.shape[0], *part.shape[2:]).transpose(0, 1)


def check(case: Case, rank: int, world: int) -> None:
    stock = make(case)
    ours = convert_batchnorm(copy.deepcopy(stock), comm.subgroup(world))
    assert isinstance(ours, CrossGpuBatchNorm) and ours.training is not case.evaluation
    whole = nn.BatchNorm2d(
        CHANNELS, **{k: v for k, v in case.options.items() if k != "act_layer"}, dtype=torch.float64
    )
    whole.load_state_dict(stock.state_dict())
    whole.train(not case.evaluation)
    act = getattr(stock, "act", nn.Identity())
    tight = {"atol": case.tolerance, "rtol": case.tolerance}
    for step in range(STEPS):
        xs, probes = inputs(case, world, step)
        x = xs[rank].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            y = ours(x)
        assert y.dtype == x.dtype and y.shape == x.shape
        y.backward(probes[rank])
        reference_x = joined(xs).double().requires_grad_()
        reference_y = act(whole(reference_x))
        reference_y.backward(joined(probes).double())
        expected_y, expected_dx = (of_rank(t, xs, rank) for t in (reference_y, reference_x.grad))
        # An output or gradient in bfloat16 has its rounding error; everything else is float32.
        loose = {"atol": 0.02, "rtol": 2**-7} if case.autocast else tight
        torch.testing.assert_close(y.double(), expected_y, **loose)
        torch.testing.assert_close(x.grad.double(), expected_dx, **loose)
    for name, parameter in ours.named_parameters():
        gradient = comm.all_reduce(parameter.grad.double().clone(), comm.subgroup(world))
        expected = whole.get_parameter(name).grad
        error = (gradient - expected).abs().max() / expected.abs().max()
        assert error < case.tolerance, f"{case.name}: {name} {error}"
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer.double(), whole.get_buffer(name).double(), **tight)
        assert (comm.all_gather(buffer.double(), comm.subgroup(world)) == buffer).all(), name


class _Shared(torch.autograd.Function):
    """A tensor that all ranks share: each rank's gradient covers its own use, and their sum is the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return comm.all_reduce(dy.clone(), comm.subgroup(comm.world_size()))


class _Gathered(torch.autograd.Function):
    """The outputs of all ranks, on all ranks."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return comm.all_gather(y, comm.subgroup(comm.world_size()))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy[comm.rank()]


def numeric_gradients(rank: int, world: int) -> None:
    """gradcheck across the ranks: every rank perturbs the whole batch and computes its share."""
    norm = CrossGpuBatchNorm(3, group=comm.subgroup(world), track_running_stats=False).double()

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x, weight, bias = map(_Shared.apply, (x, weight, bias))
        mine = x.chunk(world)[rank]
        return _Gathered.apply(torch.func.functional_call(norm, {"weight": weight, "bias": bias}, mine))

    torch.manual_seed(0)
    shapes = ((world, 3, 2, 2), (3,), (3,))
    assert torch.autograd.gradcheck(
        function, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    )


def sub_groups(rank: int, world: int) -> None:
    """With bn_size 4 and 2 images per rank, ranks 0 and 1 form one group, ranks 2 and 3 another."""
    case = Case("pairs")
    pair = rank // 2 * 2
    norm = convert_batchnorm(make(case), cgbn_group(4, images_per_rank=2))
    assert comm.group_size(norm.group) == 2
    xs, _ = inputs(case, world, 0)
    torch.testing.assert_close(norm(xs[rank]), make(case)(torch.cat(xs[pair : pair + 2]))[rank % 2 * 2 :][:2])
    assert convert_batchnorm(make(case), cgbn_group(64, images_per_rank=2)).group is comm.subgroup(world), (
        "whole world"
    )
    assert convert_batchnorm(make(case), cgbn_group(2, images_per_rank=2)).group is None, "alone"
    try:
        convert_batchnorm(make(case), cgbn_group(3, images_per_rank=1))
    except ValueError as error:
        assert "sizes that fit: 1, 2, 4" in str(error) or world == 2, error
    else:
        assert world == 2


def one_collective_each_way(rank: int, world: int) -> None:
    calls: list[str] = []
    names = [name for name in dir(dist) if name.startswith(("all_", "reduce", "broadcast", "gather"))]
    originals = {name: getattr(dist, name) for name in names}
    for name, function in originals.items():
        if callable(function):
            setattr(dist, name, lambda *a, _n=name, _f=function, **k: (calls.append(_n), _f(*a, **k))[1])
    norm = CrossGpuBatchNorm(3, group=comm.subgroup(world))
    y = norm(torch.randn(2, 3, 4, 4, requires_grad=True))
    assert calls == ["all_gather_into_tensor"], calls
    y.square().sum().backward()
    assert calls == ["all_gather_into_tensor", "all_reduce"], calls
    for name, function in originals.items():
        setattr(dist, name, function)


def recomputation(rank: int, world: int) -> None:
    """Checkpointed blocks run twice; running statistics move once, and gradients are the same."""
    for group in (comm.subgroup(world), None):
        _recompute(group, rank)


def _recompute(group: Any, rank: int) -> None:
    results = []
    for mode in ("plain", "reentrant", "other", "deepspeed"):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)]
        block = nn.Sequential(*layers)
        convert_batchnorm(block, group)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        if mode == "plain":
            y = block(x)
        elif mode == "deepspeed":
            import deepspeed

            y = deepspeed.checkpointing.checkpoint(block, x)
        else:
            y = checkpoint(block, x, use_reentrant=mode == "reentrant")
        y.square().mean().backward()
        results.append([x.grad, *(p.grad for p in block.parameters()), *(b.clone() for b in block.buffers())])
        assert int(block[1].num_batches_tracked) == 1, mode
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def compiled(rank: int, world: int) -> None:
    """Forward and backward are one graph, with the collectives inside."""
    results = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3))
        convert_batchnorm(block, comm.subgroup(world))
        function = torch.compile(block, fullgraph=True, backend="aot_eager") if compile_it else block
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        y = function(x)
        y.square().mean().backward()
        results.append([y, x.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def all_ranks_empty(rank: int, world: int) -> None:
    """No rank has a value: shapes are right and statistics do not change."""
    norm = CrossGpuBatchNorm(3, group=comm.subgroup(world))
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.shape == x.shape and norm.weight.grad.abs().sum() == 0
    assert torch.equal(norm.running_mean, torch.zeros(3)) and torch.equal(norm.running_var, torch.ones(3))


def deep_copy(rank: int, world: int) -> None:
    """Averaging the weights deep-deep_copy the model."""
    model = nn.Sequential(CrossGpuBatchNorm(3, group=comm.subgroup(world)))
    twin = copy.deepcopy(model)
    assert twin[0].group is model[0].group and twin[0].weight is not model[0].weight
    assert isinstance(repr(twin), str)


def merging(rank: int, world: int) -> None:
    """A sum of squares in float32 would lose all digits: 1e8 has a spacing of 8."""
    seeds = [torch.Generator().manual_seed(r) for r in range(world)]
    parts = [torch.randn(50 * (r + 1), 5, generator=seeds[r]) + 1e4 for r in range(world)]
    rows = [torch.stack([p.double().mean(0), p.double().var(0, unbiased=False)]).float() for p in parts]
    counts = torch.tensor([[float(len(p))] for p in parts])
    mean, var, count = merge_statistics(torch.stack(rows)[:, 0], torch.stack(rows)[:, 1], counts)
    whole = torch.cat(parts).double()
    torch.testing.assert_close(mean, whole.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(var, whole.var(0, unbiased=False), rtol=1e-4, atol=0)
    assert count == len(whole)


def main() -> None:
    comm.start()
    torch.set_num_threads(1)
    rank, world = comm.rank(), comm.world_size()
    for case in CASES:
        try:
            check(case, rank, world)
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from None
        print("PASSED", case.name, flush=True)
    for test in (
        numeric_gradients,
        sub_groups,
        one_collective_each_way,
        recomputation,
        compiled,
        all_ranks_empty,
        deep_copy,
        merging,
    ):
        test(rank, world)
        print("PASSED", test.__name__, flush=True)
    comm.stop()


if __name__ == "__main__":
    main()
