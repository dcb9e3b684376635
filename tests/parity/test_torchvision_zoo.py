"""torchvision's models of both versions through `import_weights`: the same detections and losses.

Random weights are calibrated as in `test_torchvision.py`, so that predictions spread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_torchvision import (
    HEIGHT,
    WIDTH,
    Scene,
    calibrate,
    pixels_of,
    run_torchvision,
    scene,  # noqa: F401
    torchvision_targets,
)
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from giantdet.import_weights import import_weights

SIZE = f"size=[{HEIGHT},{WIDTH}]"


def untrained(make: Callable[..., Any], **options: Any) -> Any:
    torch.manual_seed(0)
    return make(weights=None, weights_backbone=None, **options)


def saved(model: Any, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "w.pth")
    return folder / "w.pth"


def same_detections(found: Any, expected: list[dict[str, Tensor]], first_class: int, least: int) -> None:
    """Assert equal sets of boxes with classes and scores; torchvision's classes start at `first_class`.

    Up to 2% may differ: rounding decides IoUs near NMS's threshold, and thereby which boxes are suppressed.
    """
    for b, theirs in enumerate(expected):
        valid_D = found.valid_BD[b]
        assert int(valid_D.sum()) == len(theirs["boxes"]) >= least
        labels_D1 = found.labels_BD[b][valid_D, None] + first_class
        boxes_D4 = found.boxes_BD4[b][valid_D].double() + 1e4 * labels_D1
        theirs_D4 = theirs["boxes"].double() + 1e4 * theirs["labels"][:, None]
        nearest_D, index_D = torch.cdist(theirs_D4, boxes_D4, p=torch.inf).min(1)
        same_D = nearest_D < 2e-2
        assert same_D.float().mean() > 0.98, nearest_D[~same_D]
        scores_D = found.scores_BD[b][valid_D][index_D]
        torch.testing.assert_close(scores_D[same_D], theirs["scores"][same_D], atol=2e-4, rtol=0)


@torch.no_grad()
def test_mask_rcnn_version_2(scene: Scene, tmp_path: Path) -> None:  # noqa: F811
    few = {"rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 100, "box_detections_per_img": 30}
    theirs = untrained(detection.maskrcnn_resnet50_fpn_v2, **few)
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    calibrate(theirs, pixels_of(scene.batch))
    counts = ["model.rpn.pre_nms_test=200", "model.rpn.post_nms_test=100", "model.box_head.detections=30"]
    imported = import_weights(saved(theirs, tmp_path), [SIZE, *counts])
    config = imported.config.model
    assert (config.fpn.norm, config.box_head.norm, config.mask_head.norm) == ("batch", "batch", "batch")
    assert (config.rpn.convs, config.box_head.convs, config.box_head.fcs) == (2, 4, 1)
    assert imported.config.categories[11] == (12, "N/A") and len(imported.config.categories) == 90
    _, expected, _ = run_torchvision(theirs, pixels_of(scene.batch))
    found = imported.model(scene.batch).detections
    same_detections(found, expected, 1, 30)
    # The masks of the first objects, in their own boxes.
    for b, answer in enumerate(expected):
        torch.testing.assert_close(
            found.masks_BDSS[b, :3].mean((1, 2)), answer["masks"][:3, 0].mean((1, 2)), atol=2e-3, rtol=0
        )


@pytest.mark.parametrize(
    ("name", "version", "masks"),
    [
        ("fasterrcnn_resnet50_fpn", 1, False),
        ("fasterrcnn_resnet50_fpn_v2", 2, False),
        ("maskrcnn_resnet50_fpn", 1, True),
    ],
)
def test_every_tensor_is_mapped(name: str, version: int, masks: bool, monkeypatch: Any) -> None:
    """Names and shapes match; import_weights raises on missing, unknown and misshapen tensors."""
    with torch.device("meta"):
        theirs = getattr(detection, name)(weights=None, weights_backbone=None).state_dict()
    state = {key: torch.ones(()).expand(value.shape) for key, value in theirs.items()}
    monkeypatch.setattr("giantdet.import_weights.read_tensors", {"w.pth": state}.get)
    imported = import_weights("w.pth")
    config = imported.config.model.model_dump()
    assert config["conventions"] == "torchvision" and config["mask_head"]["enabled"] is masks
    assert (config["rpn"]["convs"], config["box_head"]["convs"]) == ((2, 4) if version == 2 else (1, 0))
    assert f"{len(state)} tensors: {len(state)} taken over, 0 left out\n" in imported.report


def calibrate_retinanet(model: Any, pixels: Tensor) -> None:
    """Set the norms' statistics, and predictors whose outputs spread: some scores are over 0.05."""

    def statistics(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)))

    for name, norm in model.backbone.named_modules():
        if isinstance(norm, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            nn.init.uniform_(norm.weight, *((0.1, 0.3) if name.endswith("bn3") else (0.5, 1.5)))
            norm.register_forward_pre_hook(statistics)
    features = list(model.backbone(pixels).values())
    for norm in model.backbone.modules():
        norm._forward_pre_hooks.clear()
    for head, tower, bias, std in (
        (model.head.classification_head.cls_logits, model.head.classification_head.conv, -6.0, 1.5),
        (model.head.regression_head.bbox_reg, model.head.regression_head.conv, 0.0, 0.2),
    ):
        for layer in tower.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        head.weight.mul_(std / head(tower(features[0])).std())
        head.bias.fill_(bias)


@torch.no_grad()
@pytest.mark.parametrize("version", [1, 2])
def test_retinanet(scene: Scene, tmp_path: Path, version: int) -> None:  # noqa: F811
    make = detection.retinanet_resnet50_fpn if version == 1 else detection.retinanet_resnet50_fpn_v2
    theirs, pixels = untrained(make).eval(), pixels_of(scene.batch)
    calibrate_retinanet(theirs, pixels)
    imported = import_weights(saved(theirs, tmp_path), [SIZE])
    model = imported.config.model
    assert model.type == "retinanet" and model.extra_levels_from == ("p5" if version == 1 else "c5")
    assert len(imported.config.categories) == 91 and imported.config.categories[1] == (1, "person")

    images = ImageList(pixels, [(HEIGHT, WIDTH)] * len(pixels))
    features = list(theirs.backbone(pixels).values())
    outputs, anchors = theirs.head(features), theirs.anchor_generator(images, features)
    ours = imported.model.anchors(imported.model.pyramid(pixels))
    assert torch.equal(torch.cat(ours), anchors[0])
    cells = [len(level) for level in ours]
    split = {key: list(value.split(cells, dim=1)) for key, value in outputs.items()}
    expected = theirs.postprocess_detections(
        split, [list(a.split(cells)) for a in anchors], images.image_sizes
    )
    same_detections(imported.model(scene.batch).detections, expected, 0, 50)
    if version == 1:  # the box loss of version 2 is GIoU
        targets = torchvision_targets(scene)
        for target in targets:
            target["labels"] = target["labels"] - 1
        losses = theirs.compute_loss(targets, outputs, anchors)
        imported.model.train()
        for norm in imported.model.backbone.modules():
            norm.training = False
        found = imported.model.losses(imported.model(scene.batch), scene.batch)
        torch.testing.assert_close(found["loss_cls"], losses["classification"], rtol=1e-4, atol=0)
        torch.testing.assert_close(found["loss_box_reg"], losses["bbox_regression"], rtol=1e-4, atol=0)


def test_names_before_version_0_13(tmp_path: Path) -> None:
    """RetinaNet's published file counts the ReLUs of its towers in the names."""
    state = untrained(detection.retinanet_resnet50_fpn).state_dict()
    new = import_weights(_save(state, tmp_path)).model.state_dict()
    old = {}
    for key, value in state.items():
        for i in range(4):
            key = key.replace(f"_head.conv.{i}.0.", f"_head.conv.{2 * i}!")
        old[key.replace("!", ".")] = value
    assert "head.regression_head.conv.6.weight" in old and len(old) == len(state)
    found = import_weights(_save(old, tmp_path)).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in new.items())


def _save(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "w.pth")
    return folder / "w.pth"
