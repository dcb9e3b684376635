"""Models named with their source: the same backbone as timm's, saved without the source."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import MODEL, tiny_run

from giantdet.architectures import build_model
from giantdet.config.architectures.common import BackboneConfig
from giantdet.config.classes import Classes
from giantdet.config.load import load_run, parse_run
from giantdet.config.resolve import describe
from giantdet.config.timm_args import OWNED
from giantdet.engine.train import _with_timm_name
from giantdet.export import export_config, load_detector, load_weights
from giantdet.layers.backbone import build_backbone
from giantdet.layers.model_names import with_timm_name
from giantdet.layers.weights import load_backbone_weights

SIZE = (64, 64)
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
HUB = "timm.models._hub.hf_hub_download"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder as timm saves and uploads it; the model differs from the architecture's defaults."""
    torch.manual_seed(3)
    overlay = {"mean": MEAN, "std": STD}
    model = timm.create_model(
        "test_resnet", pretrained_cfg_overlay=overlay, channels=[8, 16, 24, 32], num_classes=3
    )
    timm.models.save_for_hf(model, str(tmp_path / "repository"), safe_serialization=True)
    args = json.loads((tmp_path / "repository/config.json").read_text())["model_args"]
    assert args["channels"] == [8, 16, 24, 32] and {"num_classes", "in_chans"} <= args.keys()
    return tmp_path / "repository"


def offline(*_: Any, **__: Any) -> str:
    raise OSError("We couldn't connect\nto the hub")


@pytest.mark.parametrize(
    "name", ["hf_hub:timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k"]
)
def test_timms_own_models_need_no_download(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HUB, offline)
    config = with_timm_name(BackboneConfig(name=name, pretrained=True))
    assert config == BackboneConfig(name="resnet18.a1_in1k", pretrained=True)
    assert build_backbone(config, SIZE).body.pretrained_cfg["hf_hub_id"] == "timm/resnet18.a1_in1k"


@pytest.mark.parametrize("source", ["hf_hub", "hf-hub", "local-dir"])
def test_equals_timms_model(source: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HUB, lambda repo_id, filename, **_: str(saved / filename))
    name = f"local-dir:{saved}" if source == "local-dir" else f"{source}:user/repository"
    config = BackboneConfig(name=name, pretrained=True)
    backbone = build_backbone(config, SIZE)
    load_backbone_weights(backbone, config)
    reference = timm.create_model(name, pretrained=True).eval()
    assert (backbone.mean, backbone.std) == (MEAN, STD)
    for key, tensor in backbone.body.state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[key]), key
    image = torch.rand(1, 3, *SIZE)
    theirs = reference.forward_intermediates(image, intermediates_only=True)[-4:]
    for mine, wanted in zip(backbone.eval()(image), theirs, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_a_run_and_its_export_no_longer_need_the_source(saved: Path, tmp_path: Path) -> None:
    backbone = {"name": f"local-dir:{saved}", "pretrained": True}
    raw = tiny_run(
        tmp_path, tmp_path / "out", giantdet__model={**MODEL, "num_classes": 2, "backbone": backbone}
    )
    run = _with_timm_name(parse_run(raw))
    (tmp_path / "config.json").write_text(describe(run))
    model = build_model(run.giantdet.model, SIZE, run.giantdet.norm).eval()
    load_weights(model, run.giantdet.model)
    described = export_config(run, Classes(objects=((1, "a"), (2, "b"))))
    (tmp_path / "export").mkdir()
    save_file(model.state_dict(), tmp_path / "export/model.safetensors")
    (tmp_path / "export/config.json").write_text(described.model_dump_json())
    shutil.rmtree(saved)
    assert str(saved) not in (tmp_path / "export/config.json").read_text()
    again, config = load_detector(tmp_path / "export")
    assert config.model.backbone.name == "test_resnet" and again.pixel_scale == model.pixel_scale
    assert again.backbone.mean == MEAN
    resumed = load_run(tmp_path / "config.json").giantdet.model
    assert resumed == run.giantdet.model and build_model(resumed, SIZE, run.giantdet.norm) is not None


def test_arguments_that_giantdet_sets_are_left_out_and_logged(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="giantdet")
    config = with_timm_name(BackboneConfig(name=f"local-dir:{saved}", timm_args={"stem_type": "deep"}))
    assert config.timm_args.keys() == {"channels", "global_pool", "stem_type", "pretrained_cfg"}
    assert "giantdet sets {'num_classes': 3, 'in_chans': 3} itself" in caplog.text
    assert (
        f"the weights of backbone.name local-dir:{saved} are not loaded: backbone.pretrained is false"
        in caplog.text
    )


def test_an_unreachable_source_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HUB, offline)
    monkeypatch.setattr("giantdet.layers.hub.answers", lambda url: True)
    with pytest.raises(ValueError) as raised:
        build_backbone(BackboneConfig(name="hf_hub:user/repository"), SIZE)
    assert str(raised.value) == (
        "backbone.name: cannot get config.json of 'hf_hub:user/repository' (OSError: We couldn't connect "
        "to the hub); download the model elsewhere and name its folder as local-dir:FOLDER"
    )
    with pytest.raises(
        ValueError, match=rf"of 'local-dir:{tmp_path}' \(FileNotFoundError: Config file not found"
    ):
        build_backbone(BackboneConfig(name=f"local-dir:{tmp_path}"), SIZE)
    (tmp_path / "config.json").write_text('{"architecture": "yolo", "pretrained_cfg": {}}')
    with pytest.raises(ValueError, match="is of the architecture 'yolo', which timm does not have"):
        build_backbone(BackboneConfig(name=f"local-dir:{tmp_path}"), SIZE)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"cannot get config\.json of .*KeyError: 'architecture'"):
        build_backbone(BackboneConfig(name=f"local-dir:{tmp_path}"), SIZE)


@pytest.mark.parametrize("key", OWNED)
def test_arguments_set_by_other_keys_are_refused(key: str, tmp_path: Path) -> None:
    model = {**MODEL, "backbone": {"name": "test_resnet", "timm_args": {key: 1}}}
    with pytest.raises(ValueError) as raised:
        parse_run(tiny_run(tmp_path, tmp_path, giantdet__model=model))
    assert str(raised.value) == f"giantdet.model.backbone.timm_args.{key}: {OWNED[key]}"


def test_a_window_size_set_by_the_user_is_kept() -> None:
    config = BackboneConfig(name="swinv2_cr_tiny_224", timm_args={"window_size": 2, "embed_dim": 24})
    backbone = build_backbone(config, SIZE)
    assert backbone.body.stages[0].blocks[0].window_size == (2, 2)
