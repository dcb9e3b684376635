"""Frozen backbones: evaluation mode, no graph, nothing kept, and the same maps as in evaluation."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from giantdet.config.architectures.common import BackboneConfig, NormConfig
from giantdet.config.load import parse_run
from giantdet.errors import ConfigError
from giantdet.layers.backbone import build_backbone
from giantdet.layers.body import Backbone
from giantdet.layers.norm import apply_norm

SIZE = (64, 64)
SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_convnext": {},  # has norms after the body
    "test_efficientnet": {},  # has BatchNorms fused with activations
    "vit_tiny_patch16_224": {"timm_args": SMALL, "window": 2},
    "vit_small_patch16_dinov3": {"timm_args": SMALL, "window": 2},
    "swin_tiny_patch4_window7_224": {"timm_args": {"embed_dim": 32, "depths": [1, 1, 1, 1]}},
}


def build(name: str, **more: Any) -> Backbone:
    """A backbone with the same random weights and statistics, whatever the other options."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name, **OPTIONS[name], **more), SIZE)
    draw = torch.Generator().manual_seed(1)
    for key, tensor in sorted(backbone.state_dict().items()):
        if "running" in key or "norm" in key or "bn" in key:
            noise = torch.rand(tensor.shape, generator=draw) + 0.5
            tensor.copy_(noise if tensor.is_floating_point() else tensor)
    return backbone


def images() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("norm", ["frozen", "local"])
def test_maps_in_training_equal_those_in_evaluation(name: str, norm: Any) -> None:
    """The reference is an unfrozen model; drop path, the norm block and training mode change nothing."""
    plain = build(name).eval()
    with torch.no_grad():
        expected = plain(images())
    frozen = build(name, frozen=True, drop_path_rate=0.5, checkpoint_blocks=True)
    apply_norm(frozen, NormConfig(type=norm))
    nn.Sequential(frozen).train()
    before = {key: tensor.clone() for key, tensor in frozen.state_dict().items()}
    assert before.keys() == plain.state_dict().keys()
    maps = frozen(images())
    assert not any(module.training for module in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    for mine, theirs in zip(maps, expected, strict=True):
        assert not mine.requires_grad
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[key], tensor) for key, tensor in frozen.state_dict().items())


@pytest.mark.parametrize("name", OPTIONS)
def test_no_activation_is_kept(name: str) -> None:
    """Outputs of a backbone's modules are freed when its maps are computed; unfrozen, many are kept."""
    assert kept(build(name, frozen=True).train()) == (0, 0)
    saved, alive = kept(build(name).train())
    assert saved > 10 and alive > 5


def kept(backbone: Backbone) -> tuple[int, int]:
    """Number of tensors saved for the backward pass, and of outputs inside the body that are still alive."""
    found: list[weakref.ref[Any]] = []
    saved = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append(weakref.ref(output.untyped_storage()))

    hooks = [module.register_forward_hook(note) for module in backbone.body.modules()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(1) or t, lambda t: t):
        maps = backbone(images())
    for hook in hooks:
        hook.remove()
    returned = {level.untyped_storage()._cdata for level in maps}
    alive = [ref() for ref in found]
    return len(saved), sum(s is not None and s._cdata not in returned for s in alive)


def test_compiled_blocks_return_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiler(f, backend="aot_eager", fullgraph=True))
    name = "vit_small_patch16_dinov3"
    whole = compiler(build(name, frozen=True, compile_blocks=True).train(), backend="aot_eager")
    expected = build(name, frozen=True).train()(images())
    for mine, theirs in zip(whole(images()), expected, strict=True):
        assert not mine.requires_grad
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"backbone": {"frozen": True, "frozen_stages": 2}}}, "frozen freezes all stages"),
        ({"model": {"backbone": {"frozen": True, "deformable_stages": [4]}}}, "excludes .*deformable_stages"),
        ({"norm": {"type": "cgbn"}}, r"norm.type cgbn .*set norm.type to .frozen."),
        ({"agvm": {"enabled": True}}, "agvm.anchor is the backbone, which has no gradients.*another module"),
    ],
)
def test_settings_that_need_a_trained_backbone_are_refused(changes: dict[str, Any], message: str) -> None:
    raw = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "train_batch_size": 2}
    block = {"model": {"backbone": {"frozen": True}}, "train": {"steps": 1}} | changes
    with pytest.raises(ConfigError, match=message):
        parse_run(raw | {"giantdet": block})
