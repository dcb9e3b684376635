"""Building at ZeRO-3: no rank ever holds the whole model, and the model trains as at other stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import MODEL, launch_ok, tiny_run

from giantdet.architectures import build_model
from giantdet.config.architectures.common import BackboneConfig, NormConfig
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.data.coco import CocoDataset
from giantdet.engine.metrics import read_metrics
from giantdet.export import ExportConfig, export_model
from giantdet.layers.backbone import build_backbone
from giantdet.layers.weights import load_backbone_weights

BUILD = Path(__file__).with_name("worker_build.py")
TRAIN = Path(__file__).with_name("worker_train.py")
MEBI = 2**20
# Small enough to be quick, but large compared with the noise of a process's memory.
BACKBONE: dict[str, Any] = {"name": "vit_small_patch16_224", "window": 2, "patch_size": 16}


def measure(
    tmp_path: Path, weights: str = "-", backbone: dict[str, Any] = BACKBONE, **changes: Any
) -> dict[str, Any]:
    raw = tiny_run(tmp_path, tmp_path, giantdet__model={**MODEL, "backbone": backbone}, **changes)
    path, out = tmp_path / "run.json", tmp_path / "found.json"
    path.write_text(json.dumps(raw))
    launch_ok(BUILD, 2, path, weights, out)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_no_rank_holds_the_model(tmp_path: Path) -> None:
    found = measure(tmp_path, zero_optimization__stage=3)
    assert found["deferred"] > 40 and found["whole"] > 80 * MEBI
    assert found["after"] < found["whole"] / 2 + 16 * MEBI
    assert found["peak"] < found["whole"] / 2 + 3 * found["largest"] + 16 * MEBI
    # Control: the measurement detects a model that is held as a whole.
    whole = measure(tmp_path, zero_optimization__stage=2)
    assert whole["deferred"] == 0 and whole["peak"] > whole["whole"] - 4 * MEBI


def shards(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """Write the weights as two files and an index, the layout of large checkpoints."""
    folder.mkdir()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: state[key].contiguous() for key in keys}, folder / file)
    where = {key: file for file, keys in halves.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_weights_stream_from_shards_and_are_resampled(tmp_path: Path) -> None:
    """Patches are resampled from 14 to 16 pixels and positions from 224 to 64, as in one plain process."""
    backbone = {**BACKBONE, "name": "deit_tiny_patch16_224"}
    torch.manual_seed(1)
    source = timm.create_model(backbone["name"], patch_size=14)
    files = shards(tmp_path / "shards", source.state_dict())
    backbone["init_weights"] = str(files)
    config = BackboneConfig.model_validate(backbone)
    plain = build_backbone(config, (64, 64))
    load_backbone_weights(plain, config)
    expected = tmp_path / "expected.safetensors"
    save_file(dict(plain.body.named_parameters()), expected)
    found = measure(tmp_path, str(expected), backbone, zero_optimization__stage=3)
    assert found["wrong"] == [] and found["deferred"] > 30


def test_trains_like_stage_2(tmp_path: Path, demo_data: Path) -> None:
    """Stages 2 and 3 start from the same weights: equal losses for three steps and equal final weights."""
    model = {**MODEL, "backbone": {"name": "resnet10t"}, "num_classes": 4}
    torch.manual_seed(2)
    config = MaskRcnnConfig.model_validate(model)
    whole = build_model(config, (64, 64), NormConfig(type="local"))
    categories = CocoDataset(demo_data / "train.json", demo_data / "train").classes.objects
    exported = ExportConfig(model=config, size=(64, 64), short_side=64, categories=categories)
    export_model(whole, tmp_path / "start", exported)
    model["init_weights"] = str(tmp_path / "start")
    paths = []
    for stage in (2, 3):
        for bf16 in (False, True):
            output = tmp_path / f"{stage}{bf16}"
            settings = {
                "zero_optimization__stage": stage,
                "giantdet__model": model,
                "bf16": {"enabled": bf16},
                # Gradients that are 0 up to rounding: Adam would divide them by their own size.
                "optimizer__params__eps": 1e-5,
            }
            raw = tiny_run(demo_data, output, giantdet__data__val=None, giantdet__train__steps=3, **settings)
            paths.append(tmp_path / f"{stage}{bf16}.json")
            paths[-1].write_text(json.dumps(raw))
    launch_ok(TRAIN, 2, *paths)
    for bf16 in (False, True):
        losses, weights = {}, {}
        for stage in (2, 3):
            output = tmp_path / f"{stage}{bf16}"
            lines = read_metrics(output / "metrics.jsonl")
            losses[stage] = [line["loss"] for line in lines if "loss" in line]
            weights[stage] = load_file(output / "export/model.safetensors")
        assert losses[3] == pytest.approx(losses[2], rel=0.02 if bf16 else 1e-5)
        assert weights[3].keys() == weights[2].keys()
        for name, weight in weights[2].items():
            assert weights[3][name].dtype == weight.dtype, name
            torch.testing.assert_close(weights[3][name], weight, atol=0.02 if bf16 else 1e-4, rtol=0.0)
