"""The blocks of timm's families: found, recomputed, compiled, dropped at random."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

from giantdet.config.architectures.common import BackboneConfig
from giantdet.layers.backbone import build_backbone
from giantdet.layers.blocks import StochasticDepth, blocks_of
from giantdet.layers.body import Backbone

SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet50", 16),
        ("resnet18", 8),
        ("res2net50_26w_4s", 16),
        ("resnetv2_50", 16),
        ("convnext_tiny", 18),
        ("swin_tiny_patch4_window7_224", 12),
        ("swinv2_tiny_window8_256", 12),
        ("swinv2_cr_tiny_224", 12),
        ("davit_tiny", 12),
        ("regnety_016", 27),
        ("efficientnet_b0", 15),
        ("focalnet_tiny_srf", 12),
        ("maxvit_tiny_rw_224", 11),
        ("vit_base_patch16_224", 12),
        ("eva_giant_patch14_560", 40),
        ("vit_7b_patch16_dinov3", 40),
    ],
)
def test_blocks_are_found(name: str, blocks: int) -> None:
    """The numbers of the papers: 3 + 4 + 6 + 3 in a ResNet-50, 2 + 2 + 6 + 2 in a Swin-T."""
    with torch.device("meta"):
        body = timm.create_model(name, num_classes=0)
    assert len(blocks_of(BackboneConfig(name=name), body)) == blocks


def test_a_family_without_known_blocks_is_refused() -> None:
    with torch.device("meta"):
        body = timm.create_model("dla34", num_classes=0)
    with pytest.raises(ValueError, match=r"'dla34'.*set checkpoint_blocks and compile_blocks false"):
        blocks_of(BackboneConfig(name="dla34"), body)
    for option in ("checkpoint_blocks", "compile_blocks"):
        with pytest.raises(ValueError, match="dla34"):
            build_backbone(BackboneConfig(name="dla34", **{option: True}), (64, 64))  # type: ignore[arg-type]


def step(name: str, size: tuple[int, int], **options: object) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """Maps, gradients, and bytes kept for the backward pass, for two images in training mode."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name, **options), size).train()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *size, generator=generator)
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        maps = backbone(images)
        loss = sum((level * torch.randn(level.shape, generator=generator)).sum() for level in maps)
    bytes_kept = kept
    loss.backward()  # type: ignore[union-attr]
    gradients = {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}
    return [level.detach() for level in maps], gradients, bytes_kept


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=2e-5 * scale + 1e-7, msg=name)


def test_recomputing_every_nth_block_keeps_more_with_larger_n() -> None:
    options = {"timm_args": SMALL, "window": 2, "drop_path_rate": 0.5}
    results = [
        step("vit_tiny_patch16_224", (64, 64), checkpoint_blocks=every, **options)
        for every in (True, 1, 2, 4, False)
    ]
    kept = [result[2] for result in results]
    assert kept[0] == kept[1] < kept[2] < kept[3] < kept[4]
    one = (kept[4] - kept[0]) / 4  # bytes of one block; 4, 2, 1 of the four blocks are recomputed
    assert kept[4] - kept[2] == pytest.approx(2 * one, rel=0.05)
    assert kept[4] - kept[3] == pytest.approx(one, rel=0.05)
    for _, gradients, _ in results[:-1]:
        assert_same(results[-1][1], gradients)


@pytest.mark.parametrize("checkpoint", [False, 2])
def test_compiled_blocks_change_nothing(checkpoint: bool | int) -> None:
    """Compiled by inductor, with windows, rotary embeddings, stochastic depth and recomputation."""
    options = {"timm_args": SMALL, "window": 2, "drop_path_rate": 0.5}
    name, size = "eva02_tiny_patch14_224", (64, 64)
    eager = step(name, size, checkpoint_blocks=checkpoint, **options)
    compiled = step(name, size, checkpoint_blocks=checkpoint, compile_blocks=True, **options)
    torch.testing.assert_close(eager[0], compiled[0], rtol=1e-4, atol=1e-5)
    assert_same(eager[1], compiled[1])


def test_the_compiled_code_does_not_grow_with_depth() -> None:
    """One graph for windowed blocks, one for global ones, one for the first, whose input is strided."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = BackboneConfig(
        name="vit_tiny_patch16_224",
        compile_blocks=True,
        drop_path_rate=0.5,
        window=2,
        timm_args={**SMALL, "depth": 12},
    )
    backbone = build_backbone(config, (64, 64)).train()
    for block in backbone.body.blocks:  # the same graphs, without inductor
        block.forward = torch.compile(type(block).forward.__get__(block), dynamic=False, backend="eager")
    backbone(torch.randn(2, 3, 64, 64))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def depths(backbone: Backbone) -> Iterator[StochasticDepth]:
    return (m for m in backbone.modules() if isinstance(m, StochasticDepth))


def test_stochastic_depth_keeps_the_mean_and_drops_images() -> None:
    drop = StochasticDepth(0.3)
    drop.windows = 4
    torch.manual_seed(0)
    out = drop.train()(torch.ones(4 * 5000, 3, 2)).view(5000, 4, 6)
    kept = (out[:, 0, 0] > 0).float()
    assert float(kept.mean()) == pytest.approx(0.7, abs=0.03)
    assert torch.equal(out, (kept / 0.7)[:, None, None].expand_as(out)), "windows of one image differ"
    ones = torch.ones(4, 3, 2)
    assert torch.equal(drop.eval()(ones), ones)


def test_stochastic_depth_is_at_the_same_places_as_in_timm() -> None:
    size = (96, 64)
    vit = build_backbone(
        BackboneConfig(name="vit_tiny_patch16_224", drop_path_rate=0.3, window=4, global_blocks=4), size
    )
    rates = [round(1.0 - float(m.keep), 4) for m in depths(vit)]
    assert rates == [round(0.3 * i / 11, 4) for i in range(1, 12) for _ in range(2)]
    windows = [m.windows for m in depths(vit)]
    is_global = {2, 5, 8, 11}
    assert windows == [1 if i in is_global else 2 for i in range(1, 12) for _ in range(2)]
    for rate, expected in ((0.0, 0), (0.2, 22)):
        config = BackboneConfig(name="swin_tiny_patch4_window7_224", drop_path_rate=rate)
        swin = build_backbone(config, (224, 224))
        assert len(list(depths(swin))) == expected
        assert not any(isinstance(m, timm.layers.DropPath) and m.drop_prob for m in swin.modules())
        assert isinstance(swin, nn.Module)
