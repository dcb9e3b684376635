"""BatchNorm conversions against torch's and timm's own, and their float32 buffers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from giantdet.config.architectures.common import NormConfig
from giantdet.errors import ConfigError
from giantdet.layers.cgbn import _Normalise, bn_ranks, convert_batchnorm
from giantdet.layers.norm import CrossGpuBatchNorm, FrozenBatchNorm2d, apply_norm, check_norms

FROZEN, LOCAL = NormConfig(type="frozen"), NormConfig(type="local")


def randomised(norm: nn.BatchNorm2d, seed: int = 0) -> nn.BatchNorm2d:
    """Set statistics and affine far from their trivial initial values."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor, low, high in (
            (norm.weight, 0.3, 2.0),
            (norm.bias, -1.0, 1.0),
            (norm.running_mean, -2.0, 2.0),
            (norm.running_var, 0.1, 4.0),
        ):
            tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=g))
    norm.num_batches_tracked.fill_(7)
    return norm


def randomised_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    for i, module in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        randomised(module, i)
        module.weight.data.mul_(0.5)  # keeps the product of many scales in range
    return model


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])  # the latter: BatchNormAct2d
def test_frozen_model_equals_timm_frozen_and_plain_eval(name: str) -> None:
    model = randomised_model(name)
    x = torch.randn(2, 3, 64, 64)
    plain = model(x)
    keys = list(model.state_dict())
    reference = freeze_batch_norm_2d(randomised_model(name))(x)
    frozen = apply_norm(model, FROZEN).train()  # train mode must have no effect
    out = frozen(x)
    # timm multiplies and adds in two passes, giantdet in one that rounds once.
    torch.testing.assert_close(out, reference, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert sorted(frozen.state_dict()) == sorted(keys)
    assert not [n for n, _ in frozen.named_parameters() if "bn" in n]


def test_frozen_gradient_equals_eval_mode() -> None:
    norm = randomised(nn.BatchNorm2d(5)).eval()
    x = torch.randn(2, 5, 4, 4)
    grads = []
    for layer in (norm, FrozenBatchNorm2d.from_batchnorm(norm)):
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_frozen_copies_the_statistics() -> None:
    norm = randomised(nn.BatchNorm2d(5))
    frozen = FrozenBatchNorm2d.from_batchnorm(norm)
    before = frozen.running_mean.clone()
    norm.running_mean.add_(1)
    norm.weight.data.add_(1)
    assert torch.equal(frozen.running_mean, before)
    assert frozen.weight.max() < norm.weight.max()


def test_freezing_a_norm_without_affine() -> None:
    norm = nn.BatchNorm2d(3, affine=False).eval()
    norm.running_mean.fill_(2.0)
    x = torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(FrozenBatchNorm2d.from_batchnorm(norm)(x), norm(x))


@pytest.mark.parametrize("training", [True, False])
def test_local_equals_batchnorm(training: bool) -> None:
    stock, ours = randomised(nn.BatchNorm2d(6)), apply_norm(randomised(nn.BatchNorm2d(6)), LOCAL)
    assert isinstance(ours, CrossGpuBatchNorm)
    x = 3 + 2 * torch.randn(4, 6, 5, 5)
    results = []
    for layer in (stock.train(training), ours.train(training)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.pow(3).sum().backward()
        results.append([y, leaf.grad, layer.weight.grad, layer.bias.grad, *layer.state_dict().values()])
    assert list(stock.state_dict()) == list(ours.state_dict())
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def by_hand(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    affine = (norm.weight.double().view(1, -1, 1, 1), norm.bias.double().view(1, -1, 1, 1))
    return (x - mean) / (var + norm.eps).sqrt() * affine[0] + affine[1]


def test_local_in_bfloat16_computes_in_float32() -> None:
    """With a mean of 100 and a spread of 1, bf16 statistics would have an error of a third of the spread."""
    norm = CrossGpuBatchNorm.from_batchnorm(nn.BatchNorm2d(4)).bfloat16()
    assert norm.weight.dtype == torch.bfloat16 and norm.running_var.dtype == torch.float32
    x = (100 + torch.randn(8, 4, 16, 16)).bfloat16()
    leaf = x.clone().requires_grad_()
    y = norm(leaf)
    assert y.dtype == torch.bfloat16
    expected = by_hand(x.double(), norm)
    assert ((y.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-4).all()
    torch.testing.assert_close(
        norm.running_mean.double(), 0.1 * x.double().mean((0, 2, 3)), rtol=1e-6, atol=0
    )
    unbiased = x.double().var((0, 2, 3))
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * unbiased, rtol=1e-5, atol=0)

    probe = torch.randn_like(expected)
    (y.double() * probe).sum().backward()
    exact = x.double().requires_grad_()
    (by_hand(exact, norm) * probe.bfloat16().double()).sum().backward()
    assert leaf.grad is not None and exact.grad is not None and norm.weight.grad is not None
    assert (leaf.grad.double() - exact.grad).abs().max() < 0.02 * exact.grad.abs().max()
    assert norm.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("config", [FROZEN, LOCAL])
@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_casts_keep_buffers_exact(config: NormConfig, cast) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Conv2d(3, 5, 1), randomised(nn.BatchNorm2d(5)))
    expected = {k: v.clone() for k, v in model[1].named_buffers()}
    converted = apply_norm(model, config)
    cast(converted)
    assert converted[0].weight.dtype != torch.float32
    for name, value in expected.items():
        buffer = dict(converted[1].named_buffers())[name]
        assert buffer.dtype == value.dtype and torch.equal(buffer, value), name
    if config is FROZEN:
        assert (
            torch.equal(converted[1].weight, model[1].weight) and converted[1].weight.dtype == torch.float32
        )


def test_buffers_still_follow_devices_and_wider_types() -> None:
    norm = FrozenBatchNorm2d(3)
    assert norm.to("meta").running_mean.device.type == "meta"
    assert FrozenBatchNorm2d(3).double().running_mean.dtype == torch.float64


def test_local_keeps_the_parameters_and_frozen_ones_stay_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), FrozenBatchNorm2d(3))
    weight = model[0].weight
    apply_norm(model, LOCAL)
    assert model[0].weight is weight
    assert isinstance(model[1], FrozenBatchNorm2d)
    assert isinstance(apply_norm(model, FROZEN)[0], FrozenBatchNorm2d)  # a local one can be frozen later


def test_train_mode_follows() -> None:
    assert not apply_norm(nn.BatchNorm2d(3).eval(), LOCAL).training


def test_compiles_to_one_graph() -> None:
    model = nn.Sequential(CrossGpuBatchNorm(3), FrozenBatchNorm2d(3))
    x = torch.randn(2, 3, 4, 4)
    out = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(out, F.batch_norm(x, None, None, training=True), rtol=1e-4, atol=1e-4)


def test_ranks_of_a_batch_norm_against_brute_force() -> None:
    """All groupings of consecutive ranks, and the whole world for sizes beyond it."""
    for world, images in itertools.product((1, 2, 3, 4, 6, 8), (1, 2, 3)):
        fitting = {images * ranks: ranks for ranks in range(1, world + 1) if world % ranks == 0}
        for size in range(1, 30):
            if size in fitting or size > world * images:
                assert bn_ranks(size, images, world) == fitting.get(size, world)
            else:
                with pytest.raises(ConfigError) as caught:
                    bn_ranks(size, images, world)
                listed = str(caught.value).rpartition(": ")[2]
                assert listed == ", ".join(str(s) for s in sorted(fitting))


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        ({"type": "cgbn", "bn_size": 6}, ["giantdet.norm: bn_size 6", "sizes that fit: 2, 4, 8"]),
        ({"type": "cgbn", "bn_size": 3}, ["giantdet.norm: bn_size 3", "sizes that fit: 2, 4, 8"]),
        ({"fpn": {"type": "cgbn", "bn_size": 5}}, ["giantdet.norm.fpn: bn_size 5"]),
    ],
)
def test_invalid_group_sizes(norm: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_norms(NormConfig.model_validate(norm), images_per_rank=2, world_size=4)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_norm_in_several_places_is_converted_once() -> None:
    norm = nn.BatchNorm2d(4)
    model = nn.Module()
    model.first, model.second, model.inner = norm, norm, nn.Sequential(nn.Conv2d(4, 4, 1), norm)
    converted = convert_batchnorm(model)
    assert isinstance(converted.first, CrossGpuBatchNorm)
    assert converted.first is converted.second is converted.inner[1]
    assert len([m for m in converted.modules() if isinstance(m, _BatchNorm)]) == 1


def test_an_empty_batch_does_not_count_in_a_cumulative_average() -> None:
    norm = CrossGpuBatchNorm(3, momentum=None)
    plain = nn.BatchNorm2d(3, momentum=None)
    batches = [torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(n)) for n in (0, 2, 0, 3)]
    for batch in batches:
        norm(batch)
        if len(batch):
            plain(batch)
    assert norm.num_batches_tracked == plain.num_batches_tracked == 2
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_gradients_of_gradients_are_refused_or_correct() -> None:
    """Across a group they are an error; within one rank's images they equal PyTorch's."""
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)

    def penalty(normalise: Callable[[Tensor], Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(normalise(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    norm, plain = CrossGpuBatchNorm(3).double(), nn.BatchNorm2d(3).double()
    torch.testing.assert_close(penalty(norm), penalty(plain))
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        penalty(lambda x: _Normalise.apply(x, norm.weight, norm.bias, norm.eps, None)[0])
