"""Exports: from engines at every ZeRO stage, in one or several files, and loading without DeepSpeed."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import MODEL, REPO, environment, launch_ok, tiny_run

from giantdet.architectures import build_model
from giantdet.architectures.mask_rcnn import MaskRcnn
from giantdet.config.architectures.common import NormConfig
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.engine.draw import draw
from giantdet.engine.predict import load_image, load_predictor
from giantdet.export import export_checkpoint, load_detector, load_weights, read_export_config, shard_plan


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    files = []
    for stage in (0, 2, 3):
        files.append(folder / f"zero{stage}.json")
        raw = tiny_run(demo_data, folder, zero_optimization__stage=stage)
        files[-1].write_text(json.dumps(raw))
    out = tmp_path_factory.mktemp("exports")
    launch_ok(REPO / "tests/distributed/worker_export.py", 2, out, *files)
    return out


def _assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_engine_export_equals_the_original_model(engines: Path, stage: int) -> None:
    folder = engines / f"zero{stage}"
    before = torch.load(folder / "state.pt")
    _assert_equal(load_file(folder / "whole/model.safetensors"), before)
    assert sorted(p.name for p in (folder / "whole").iterdir()) == ["config.json", "model.safetensors"]
    detector, config = load_detector(folder / "whole")
    _assert_equal(detector.state_dict(), before)
    assert not detector.training
    assert config.categories == ((1, "circle"), (3, "rectangle"), (4, "triangle"), (7, "star"))
    assert config.model.num_classes == 4


@pytest.mark.parametrize("stage", [0, 3])
def test_shards_contain_the_same_weights(engines: Path, stage: int) -> None:
    folder = engines / f"zero{stage}/sharded"
    before = torch.load(engines / f"zero{stage}/state.pt")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not list(folder.glob("*.part"))
    for file in files:
        held = load_file(folder / file)
        assert {key for key, name in index["weight_map"].items() if name == file} == set(held)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in before.values())
    _assert_equal(load_detector(folder)[0].state_dict(), before)


def test_missing_shard_is_named(engines: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(engines / "zero0/sharded", tmp_path / "copy")
    next(iter(sorted(folder.glob("model-00002*")))).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-.* is missing"):
        load_detector(folder)


def test_shard_plan_keeps_order_and_limit() -> None:
    sizes = {"a": 5, "b": 5, "c": 1, "d": 20, "e": 3}
    assert shard_plan(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert shard_plan(sizes, 100) == [["a", "b", "c", "d", "e"]]


def test_loads_without_deepspeed(tiny_export: Path, demo_data: Path) -> None:
    image = sorted((demo_data / "val").iterdir())[0]
    program = (
        "import sys\nfrom giantdet.engine.predict import load_predictor\n"
        f"load_predictor({str(tiny_export)!r})({str(image)!r})\nassert 'deepspeed' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _detector(**changes: object) -> tuple[MaskRcnn, MaskRcnnConfig]:
    config = MaskRcnnConfig.model_validate({**MODEL, "num_classes": 4, **changes})
    torch.manual_seed(1)
    return build_model(config, (64, 64), NormConfig(type="local")), config


@pytest.mark.parametrize("as_folder", [True, False])
def test_init_weights_from_an_export(tiny_export: Path, as_folder: bool) -> None:
    path = tiny_export if as_folder else tiny_export / "model.safetensors"
    detector, config = _detector(init_weights=str(path))
    load_weights(detector, config)
    _assert_equal(detector.state_dict(), load_file(tiny_export / "model.safetensors"))


def test_layers_of_other_classes_start_afresh(tiny_export: Path, caplog: pytest.LogCaptureFixture) -> None:
    detector, config = _detector(init_weights=str(tiny_export), num_classes=7)
    fresh = {key: value.clone() for key, value in detector.state_dict().items()}
    with caplog.at_level(logging.WARNING, "giantdet"):
        load_weights(detector, config)
    saved = load_file(tiny_export / "model.safetensors")
    changed = [key for key in saved if saved[key].shape != fresh[key].shape]
    assert len(changed) == 6, "weight and bias of classes, deltas and masks"
    for key, value in detector.state_dict().items():
        assert torch.equal(value, fresh[key] if key in changed else saved[key]), key
    assert all(key in caplog.text for key in changed)
    assert "new weights for" in caplog.text


def test_a_model_without_masks_begins_one_with_masks(
    tiny_export: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As EVA-02 does from Objects365 to COCO; a mask head that is there in part is still a mismatch."""
    state = load_file(tiny_export / "model.safetensors")
    boxes = {key: value for key, value in state.items() if not key.startswith("mask_head.")}
    save_file(boxes, tmp_path / "model.safetensors")
    detector, config = _detector(init_weights=str(tmp_path / "model.safetensors"))
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    load_weights(detector, config)
    assert "model.safetensors has no mask_head; new weights for it" in caplog.text
    _assert_equal(detector.state_dict(), before | boxes)
    some = next(key for key in state if key.startswith("mask_head."))
    save_file({key: value for key, value in state.items() if key != some}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=some):
        load_weights(detector, config)


def test_mismatch_is_reported_key_by_key(tiny_export: Path, tmp_path: Path) -> None:
    state = load_file(tiny_export / "model.safetensors")
    removed = next(key for key in state if key.startswith("fpn."))
    reshaped = next(key for key in state if key.startswith("rpn.") and state[key].ndim > 1)
    del state[removed]
    state[reshaped] = state[reshaped][:1].clone()
    state["head.extra"] = torch.zeros(2)
    save_file(state, tmp_path / "model.safetensors")
    detector, config = _detector(init_weights=str(tmp_path / "model.safetensors"))
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with pytest.raises(ValueError, match="cannot load") as error:
        load_weights(detector, config)
    assert all(key in str(error.value) for key in (removed, reshaped, "head.extra"))
    _assert_equal(detector.state_dict(), before)


def test_torchvision_file_as_init_weights(tmp_path: Path) -> None:
    """A state dict of torchvision's Mask R-CNN, loaded through the setting that users have."""
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=5
    )
    torch.save(theirs.state_dict(), tmp_path / "maskrcnn.pth")
    config = MaskRcnnConfig.model_validate(
        {
            "num_classes": 4,
            "conventions": "torchvision",
            "backbone": {"name": "resnet50"},
            "init_weights": str(tmp_path / "maskrcnn.pth"),
        }
    )
    detector = build_model(config, (64, 64), NormConfig(type="local"))
    load_weights(detector, config)
    state, source = detector.state_dict(), theirs.state_dict()
    assert torch.equal(
        state["backbone.body.layer3.1.conv2.weight"], source["backbone.body.layer3.1.conv2.weight"]
    )
    assert torch.equal(state["box_head.fcs.1.weight"], source["roi_heads.box_head.fc7.weight"])
    scores = source["roi_heads.box_predictor.cls_score.weight"]
    assert torch.equal(state["box_head.classes.weight"], torch.cat([scores[1:], scores[:1]]))


def test_not_an_export_and_not_a_checkpoint(tmp_path: Path, tiny_export: Path) -> None:
    with pytest.raises(ValueError, match=r"not a giantdet export \(no config.json\)"):
        load_detector(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {}, "size": [64, 64]}')
    with pytest.raises(
        ValueError, match=r"config.json: not from a giantdet export \(short_side: Field required"
    ):
        load_detector(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_detector(tmp_path)
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        export_checkpoint(tmp_path, tmp_path / "out", read_export_config(tiny_export))


def test_predictor_on_file_and_array(tiny_export: Path, demo_data: Path) -> None:
    predictor = load_predictor(tiny_export, "cpu")
    path = sorted((demo_data / "val").iterdir())[1]
    pixels = load_image(path)
    found, again = predictor(path, threshold=0.0), predictor(pixels, threshold=0.0)
    assert len(found.names) == len(found.labels_D) == len(found.boxes_D4) > 0
    assert torch.equal(found.boxes_D4, again.boxes_D4) and torch.equal(found.scores_D, again.scores_D)
    assert found.masks_DHW is not None and found.masks_DHW.shape[1:] == pixels.shape[:2]
    names = dict(predictor.config.categories)
    assert found.names == [names[number] for number in found.category_ids]
    assert (found.scores_D.diff() <= 0).all(), "best first"
    assert len(predictor(path, threshold=1.0).names) == 0
    picture = draw(pixels, found)
    assert isinstance(picture, Image.Image)
    blank = draw(pixels, predictor(path, threshold=1.0))
    assert np.any(np.asarray(picture) != np.asarray(blank)), "objects are drawn"
    assert {r["category_id"] for r in found.to_coco(5)} <= {1, 3, 4, 7}


def test_predictor_drops_classes_without_a_name(tiny_export: Path, demo_data: Path) -> None:
    """`num_classes` may exceed the data set's categories."""
    predictor = load_predictor(tiny_export, "cpu")
    predictor.config = predictor.config.model_copy(update={"categories": ((1, "circle"),)})
    found = predictor(sorted((demo_data / "val").iterdir())[0], threshold=0.0)
    assert set(found.names) <= {"circle"}
