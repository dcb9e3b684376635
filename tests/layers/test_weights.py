"""Loading of backbone weights against timm's own loading; messages about mismatches."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from giantdet.config.architectures.common import BackboneConfig
from giantdet.layers.backbone import Backbone, build_backbone
from giantdet.layers.weights import load_backbone_weights, load_strictly, report_mismatch

SIZE = (64, 96)


def classifier(name: str, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return timm.create_model(name).state_dict()


def loaded(name: str, file: Path, **options: Any) -> Backbone:
    config = BackboneConfig(name=name, init_weights=str(file), **options)
    backbone = build_backbone(config, SIZE)
    load_backbone_weights(backbone, config)
    return backbone.eval()


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_classifier_checkpoint_loads_and_the_head_is_logged(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = classifier(name)
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "w.safetensors"
    )
    with caplog.at_level(logging.INFO, logger="giantdet"):
        body = loaded(name, tmp_path / "w.safetensors").body.state_dict()
    for key, value in body.items():
        wanted = state[key].half().float() if value.is_floating_point() else state[key]
        assert value.dtype == wanted.dtype and torch.equal(value, wanted), key
    left_out = set(state) - set(body)
    assert left_out and all(key in caplog.text for key in left_out)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("window", [0, 2])
def test_position_and_patch_embeddings_are_resampled_as_timm_does(
    name: str, window: int, tmp_path: Path
) -> None:
    torch.save({"model": classifier(name)}, tmp_path / "w.pth")
    body = loaded(name, tmp_path / "w.pth", window=window).body.state_dict()
    overlay = dict(file=str(tmp_path / "w.pth"))
    reference = timm.create_model(
        name, pretrained=True, num_classes=0, img_size=SIZE, patch_size=16, pretrained_cfg_overlay=overlay
    ).state_dict()
    assert body["pos_embed"].shape[1] == 4 * 6 + 1 and body["patch_embed.proj.weight"].shape[-1] == 16
    for key, value in body.items():
        assert torch.equal(value, reference[key]), key


def test_final_norm_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the detectors of ViTDet, EVA-02 and PE do with the weights of classifiers."""
    torch.save(classifier("vit_tiny_patch16_224"), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "giantdet"):
        body = loaded("vit_tiny_patch16_224", tmp_path / "w.pth", timm_args={"final_norm": False}).body
    assert isinstance(body.norm, torch.nn.Identity)
    assert "norm.weight, norm.bias" in caplog.text


def test_pretrained_weights_are_loaded_by_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = classifier("resnet18")
    torch.save(state, tmp_path / "w.pth")
    original = timm.create_model

    def offline(name: str, **kwargs: Any) -> torch.nn.Module:
        return original(name, **kwargs, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth")))

    config = BackboneConfig(name="resnet18", pretrained=True)
    monkeypatch.setattr(timm, "create_model", offline)
    backbone = build_backbone(config, SIZE)
    load_backbone_weights(backbone, config)
    for key, value in backbone.body.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_pretrained_without_weights_says_what_to_do() -> None:
    config = BackboneConfig(name="swinv2_cr_tiny_224", pretrained=True)
    with pytest.raises(ValueError, match=r"weights of 'swinv2_cr_tiny_224'.*init_weights"):
        load_backbone_weights(build_backbone(config, SIZE), config)


def test_without_weights_nothing_changes() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet18"), SIZE)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    load_backbone_weights(backbone, BackboneConfig(name="resnet18"))
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())


def test_both_sources_are_refused() -> None:
    config = BackboneConfig(name="resnet18", pretrained=True, init_weights="x.pth")
    with pytest.raises(ValueError, match="not both"):
        load_backbone_weights(build_backbone(config, SIZE), config)


def test_mismatch_lists_every_key_and_loads_nothing(tmp_path: Path) -> None:
    state = classifier("resnet18")
    del state["layer1.0.conv1.weight"], state["bn1.num_batches_tracked"]
    state["layer2.0.bn1.weight"] = torch.ones(3)
    state["fpn.weight"] = torch.ones(2)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    config = BackboneConfig(name="resnet18", init_weights=str(tmp_path / "w.pt"))
    backbone = build_backbone(config, SIZE)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with pytest.raises(ValueError) as raised:
        load_backbone_weights(backbone, config)
    lines = [line.strip() for line in str(raised.value).splitlines()]
    assert lines[0].startswith("cannot load") and "w.pt as backbone 'resnet18'" in lines[0]
    assert lines[1:] == [
        "1 missing:",
        "layer1.0.conv1.weight",
        "1 unexpected:",
        "fpn.weight",
        "1 with another shape:",
        "layer2.0.bn1.weight: 3 in the weights, 128 in the model",
    ]
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file(classifier("resnet18"), tmp_path / "w.safetensors")
    for name in (
        "convnext_atto",
        "swin_tiny_patch4_window7_224",
        "vit_tiny_patch16_224",
        "eva02_tiny_patch14_224",
    ):
        with pytest.raises(ValueError, match=r"w\.safetensors"):
            loaded(name, tmp_path / "w.safetensors")


def test_report_and_strict_loading_work_for_any_module() -> None:
    linear = torch.nn.Linear(2, 3)
    state = {"weight": torch.ones(3, 2), "bias": torch.zeros(3), "extra": torch.ones(1)}
    assert report_mismatch(linear.state_dict(), state, "x", lambda key: key == "extra") == ["extra"]
    load_strictly(linear, state, "x", lambda key: key == "extra")
    assert torch.equal(linear.weight, torch.ones(3, 2))
    with pytest.raises(ValueError, match="1 unexpected:\n    extra"):
        load_strictly(linear, state, "x")
