"""Multi-scale testing against a brute force that runs the model on each view by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MODELS, tiny_run
from torchvision.ops import batched_nms

from giantdet import cli, load_predictor
from giantdet.architectures import Architecture, build_model
from giantdet.config.architectures import SECTIONS, ArchitectureConfig
from giantdet.config.architectures.common import NormConfig
from giantdet.config.types import TtaConfig
from giantdet.data.demo import make_demo
from giantdet.data.views import no_targets, passes_of, views_of
from giantdet.engine.tta import MultiScale
from giantdet.errors import ConfigError, InputError
from giantdet.structures import Batch, Detections

PIXELS = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
CONFIG = TtaConfig(short_sides=(40, 64, 90), max_side=120)


def built(kind: str, **more: Any) -> tuple[Architecture, ArchitectureConfig]:
    raw = {**MODELS[kind], "num_classes": 3, **more}
    if kind == "panoptic_fpn":
        raw["num_stuff_classes"] = 4
    section = SECTIONS[kind].model_validate(raw)
    torch.manual_seed(0)
    model = build_model(section, (64, 64), NormConfig(type="local")).eval()
    for name, parameter in model.named_parameters():
        if name.startswith("mask_head") and ".masks." in name:
            parameter.data *= 500  # otherwise all probabilities are close to 1/2
    return model, section


def whole(pixels: np.ndarray) -> Batch:
    height, width = pixels.shape[:2]
    return Batch(
        torch.from_numpy(pixels).permute(2, 0, 1)[None],
        torch.tensor([[height, width]], dtype=torch.float32),
        no_targets(1),
        torch.zeros(1, dtype=torch.int64),
        torch.tensor([7]),
        torch.tensor([[height, width]]),
    )


def by_hand(model: Architecture, pixels: np.ndarray, short_side: int, flip: bool, canvas: tuple[int, int]):
    """Return the batch of one view, resized with Pillow, and its scale (y, x)."""
    height, width = pixels.shape[:2]
    new = [short_side * side / min(height, width) for side in (height, width)]
    if max(new) > CONFIG.max_side:
        new = [side * CONFIG.max_side / max(new) for side in new]
    rows, columns = (int(side + 0.5) for side in new)
    view = np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BILINEAR))
    view = view[:, ::-1] if flip else view
    image = np.zeros((*canvas, 3), np.uint8)
    image[:rows, :columns] = view
    batch = whole(image)._replace(sizes_B2=torch.tensor([[rows, columns]], dtype=torch.float32))
    return batch, (rows / height, columns / width)


CANVASES = [(64, 96), (64, 96), (64, 96), (96, 128), (96, 128), (96, 128)]
"""The six views, three at a time: 40 x 56, 40 x 56, 64 x 90; 64 x 90, 86 x 120, 86 x 120."""


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "branch"),
    [
        ("mask_rcnn", False),
        ("mask_rcnn", True),
        ("cascade_mask_rcnn", False),
        ("cascade_mask_rcnn", True),
        ("retinanet", False),
        ("panoptic_fpn", False),
    ],
)
def test_merged_objects_equal_a_brute_force(kind: str, branch: bool) -> None:
    more = {"semantic_branch": {"enabled": True, "embed": True, "width": 16}} if branch else {}
    model, section = built(kind, **more)
    state = copy.deepcopy(model.state_dict())
    found, batch = MultiScale(model, section, CONFIG, "cpu")(whole(PIXELS))
    assert found.detections is not None and batch.image_ids_B.tolist() == [7]
    assert batch.sizes_B2.tolist() == batch.original_sizes_B2.tolist() == [[50, 70]]
    assert model.canvas == (64, 64) and all(state[k].equal(v) for k, v in model.state_dict().items())

    boxes, scores, labels, views = [], [], [], []
    for n, canvas in enumerate(CANVASES):
        flip = n % 2 == 1
        view, (scale_y, scale_x) = by_hand(model, PIXELS, CONFIG.short_sides[n // 2], flip, canvas)
        # A model built for this canvas, with the same weights.
        other = build_model(section, canvas, NormConfig(type="local")).eval()
        other.load_state_dict(state)
        outputs = other(view)
        views.append((other, view, scale_y, scale_x, flip))
        valid = outputs.detections.valid_BD[0]
        x0, y0, x1, y1 = outputs.detections.boxes_BD4[0][valid].unbind(1)
        if flip:
            x0, x1 = view.sizes_B2[0, 1] - x1, view.sizes_B2[0, 1] - x0
        boxes.append(torch.stack([x0 / scale_x, y0 / scale_y, x1 / scale_x, y1 / scale_y], 1))
        scores.append(outputs.detections.scores_BD[0][valid])
        labels.append(outputs.detections.labels_BD[0][valid])
    all_boxes, all_scores, all_labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
    keep = batched_nms(all_boxes.double(), all_scores.double(), all_labels, section.detections_nms_iou)
    keep = keep[: section.most_detections]
    ours = found.detections
    valid = ours.valid_BD[0]
    assert valid.sum() == len(keep) > 5
    assert len(ours.scores_BD[0]) == section.most_detections
    torch.testing.assert_close(ours.scores_BD[0][valid], all_scores[keep], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.boxes_BD4[0][valid], all_boxes[keep], atol=2e-2, rtol=0)
    assert ours.labels_BD[0][valid].equal(all_labels[keep])
    if kind == "retinanet":
        assert ours.masks_BDSS is None
        return
    masks = []
    for other, view, scale_y, scale_x, flip in views:
        x0, y0, x1, y1 = all_boxes[keep].unbind(1)
        x0, y0, x1, y1 = x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y
        if flip:
            x0, x1 = view.sizes_B2[0, 1] - x1, view.sizes_B2[0, 1] - x0
        given = Detections(
            torch.stack([x0, y0, x1, y1], 1)[None],
            all_scores[keep][None],
            all_labels[keep][None],
            torch.ones(1, len(keep), dtype=torch.bool),
            None,
        )
        probabilities = other(view, given).detections.masks_BDSS[0]
        masks.append(probabilities.flip(2) if flip else probabilities)
    assert (masks[0] - masks[1]).abs().max() > 1e-2
    torch.testing.assert_close(ours.masks_BDSS[0][valid], torch.stack(masks).mean(0), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["semantic_fpn", "panoptic_fpn", "upernet"])
def test_semantic_maps_are_mean_probabilities(kind: str) -> None:
    model, section = built(kind)
    found, batch = MultiScale(model, section, CONFIG, "cpu")(whole(PIXELS))
    total = torch.zeros(())
    for n, canvas in enumerate(CANVASES):
        flip = n % 2 == 1
        view, _ = by_hand(model, PIXELS, CONFIG.short_sides[n // 2], flip, canvas)
        other = build_model(section, canvas, NormConfig(type="local")).eval()
        other.load_state_dict(model.state_dict())
        logits = torch.nn.functional.interpolate(other(view).semantic_BCHW, canvas, mode="bilinear")
        rows, columns = (int(side) for side in view.sizes_B2[0])
        logits = torch.nn.functional.interpolate(logits[:, :, :rows, :columns], (50, 70), mode="bilinear")
        total = total + (logits.flip(3) if flip else logits).softmax(1)
    assert found.semantic_BCHW is not None and batch.images_B3HW.shape == (1, 3, 50, 70)
    torch.testing.assert_close(found.semantic_BCHW.exp(), total / 6, atol=1e-5, rtol=0)


def test_views_equal_resize_shortest_edge() -> None:
    """The sizes follow the rule of detectron2's ResizeShortestEdge, computed by hand."""
    config = TtaConfig(short_sides=(200, 400), max_side=600, flip=True)
    assert [(v.size_hw, v.flip) for v in views_of((480, 640), config)] == [
        ((200, 267), False),
        ((200, 267), True),
        ((400, 533), False),
        ((400, 533), True),
    ]
    assert [v.size_hw for v in views_of((1000, 100), config)][::2] == [(600, 60), (600, 60)]
    assert [len(part) for part in passes_of(views_of((480, 640), config), 3)] == [3, 1]
    assert len(views_of((480, 640), config.model_copy(update={"flip": False}))) == 2


BACKBONES: dict[str, dict[str, Any]] = {
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "timm_args": {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 2]},
    },
    "swin v2": {
        "name": "swinv2_tiny_window8_256",
        "timm_args": {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 2]},
    },
    "swin v2 cr": {
        "name": "swinv2_cr_tiny_224",
        "timm_args": {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 2]},
    },
    "dinov3": {
        "name": "vit_small_patch16_dinov3",
        "timm_args": {"embed_dim": 64, "depth": 2, "num_heads": 2},
        "window": 3,
        "global_blocks": 1,
    },
    "vit, positions interpolated": {
        "name": "vit_tiny_patch16_224",
        "timm_args": {"embed_dim": 64, "depth": 2, "num_heads": 2},
        "window": 3,
        "global_blocks": 1,
        "position_grid": [5, 5],
    },
}


@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
def test_changing_the_canvas_equals_building_for_it(name: str) -> None:
    model, section = built("semantic_fpn", backbone=BACKBONES[name])
    other = build_model(section, (96, 160), NormConfig(type="local")).eval()
    other.load_state_dict(model.state_dict())
    small, large = whole(PIXELS[:50, :64].repeat(2, 0)[:64]), whole(np.tile(PIXELS, (2, 3, 1))[:96, :160])
    before = model(small).semantic_BCHW
    model.set_canvas((96, 160))
    torch.testing.assert_close(model(large).semantic_BCHW, other(large).semantic_BCHW)
    model.set_canvas((64, 64))
    assert model(small).semantic_BCHW.equal(before)


@torch.no_grad()
def test_positions_of_the_canvas_are_interpolated() -> None:
    backbone = {k: v for k, v in BACKBONES["vit, positions interpolated"].items() if k != "position_grid"}
    model, _ = built("semantic_fpn", backbone=backbone)
    same = {**backbone, "position_grid": [4, 4]}
    other = build_model(
        SECTIONS["semantic_fpn"].model_validate(
            {**MODELS["semantic_fpn"], "num_classes": 3, "backbone": same}
        ),
        (96, 160),
        NormConfig(type="local"),
    ).eval()
    other.load_state_dict(model.state_dict())
    large = whole(np.tile(PIXELS, (2, 3, 1))[:96, :160])
    model.set_canvas((96, 160))
    torch.testing.assert_close(model(large).semantic_BCHW, other(large).semantic_BCHW)


def test_models_of_a_fixed_size_are_refused() -> None:
    more = {"relative_positions": True}
    model, _ = built("semantic_fpn", backbone={**BACKBONES["vit, positions interpolated"], **more})
    with pytest.raises(InputError, match="relative_positions or attend_padding is built for one"):
        model.set_canvas((96, 160))


def test_commands_agree_and_refuse_tiles(tiny_export: Path, tmp_path: Path, capsys: Any) -> None:
    """eval, predict and Python give the same results; options override the settings of the export."""
    make_demo(tmp_path / "data", 1, 2, 64, 0)
    folder = tmp_path / "data/val"
    annotations = ["--annotations", str(tmp_path / "data/val.json")]
    options = ["--tta-sides", "48", "80", "--tta-merge", "wbf", "--no-tta-flip"]
    results = tmp_path / "results.json"
    command = ["eval", str(tiny_export), *annotations, "--images", str(folder), "--workers", "0"]
    assert cli.main([*command, *options, "--results", str(results)]) == 0
    evaluated = json.loads(results.read_text())
    command = ["predict", str(tiny_export), str(folder), *annotations, "--threshold", "0", "--no-overlays"]
    assert cli.main([*command, *options, "--output", str(tmp_path / "out")]) == 0
    predicted = json.loads((tmp_path / "out/results.json").read_text())
    assert [r["score"] for r in predicted] == pytest.approx([r["score"] for r in evaluated], abs=1e-5)
    assert len(predicted) > 2 and all("segmentation" in r for r in predicted)
    predictor = load_predictor(tiny_export, "cpu")
    config = TtaConfig(short_sides=(48, 80), merge="wbf", flip=False)
    files = [
        folder / image["file_name"]
        for image in json.loads((tmp_path / "data/val.json").read_text())["images"]
    ]
    found = predictor(files, 0.0, tta=config)
    assert [float(s) for one in found for s in one.scores_D] == pytest.approx([r["score"] for r in predicted])
    once = predictor(files, 0.0)
    assert [one.scores_D.tolist() for one in once] != [one.scores_D.tolist() for one in found]
    capsys.readouterr()
    assert cli.main([*command, "--tta", "--tile", "32"]) == 2
    assert "give one of the two" in capsys.readouterr().err
    predictor.config = predictor.config.model_copy(update={"window_stride": 32})
    with pytest.raises(ConfigError, match="window_stride is 32: leave out one"):
        predictor(files, tta=config)


def test_training_evaluates_in_several_scales(tmp_path: Path) -> None:
    """eval.tta of the JSON is used in training and exported; giantdet eval gives the same scores."""
    make_demo(tmp_path / "data", 2, 2, 64, 0)
    raw = tiny_run(tmp_path / "data", tmp_path / "run")
    raw["giantdet"]["eval"] = {"tta": {"short_sides": [48, 80]}}
    (tmp_path / "run.json").write_text(json.dumps(raw))
    assert cli.main(["train", "--config", str(tmp_path / "run.json"), "train.steps=1"]) == 0
    trained = json.loads((tmp_path / "run/results.json").read_text())
    results = tmp_path / "results.json"
    command = ["eval", str(tmp_path / "run/export"), "--config", str(tmp_path / "run.json"), "--workers", "0"]
    assert cli.main([*command, "--results", str(results)]) == 0
    assert load_predictor(tmp_path / "run/export", "cpu").config.tta == TtaConfig(short_sides=(48, 80))
    found = json.loads(results.read_text())
    assert len(found) == len(trained) > 0
    assert [r["score"] for r in found] == pytest.approx([r["score"] for r in trained], abs=1e-4)
