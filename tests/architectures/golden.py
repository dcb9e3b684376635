"""detectron2's small models with the same weights here, and comparisons with what they gave."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from giantdet.architectures import Architecture, build_model
from giantdet.config.architectures import SECTIONS
from giantdet.config.architectures.common import NormConfig
from giantdet.config.conventions import CONVENTIONS
from giantdet.layers.norm import FrozenBatchNorm2d
from giantdet.ops.masks import paste_masks
from giantdet.structures import Batch, Detections, Targets

CANVAS = (256, 320)
SLOTS = 8
BACKBONE: dict[str, Any] = {"name": "resnet50", "timm_args": {"channels": [8, 16, 32, 64]}}
# Of detectron2's RPN here, by which it divides; it samples all anchors that it has.
RPN_SLOTS = 32768
RCNN: dict[str, Any] = {
    "num_classes": 5,
    "backbone": {**BACKBONE, "stride_in_1x1": True},
    "fpn": {"channels": 32},
    "rpn": {
        "batch_per_image": RPN_SLOTS,
        "positive_fraction": 1.0,
        "pre_nms_train": 1000,
        "pre_nms_test": 200,
        "post_nms_train": 300,
        "post_nms_test": 100,
    },
    "mask_head": {"convs": 2, "width": 32, "sampling_ratio": 0, "slots": 100},
}
BOX_HEAD: dict[str, Any] = {
    "width": 64,
    "sampling_ratio": 0,
    "batch_per_image": 4096,
    "positive_fraction": 1.0,
    "detections": 60,
}

_NAMES = (
    (r"^backbone\.bottom_up\.stem\.conv1\.norm", "backbone.body.bn1"),
    (r"^backbone\.bottom_up\.stem\.conv1", "backbone.body.conv1"),
    (r"^backbone\.bottom_up\.(res\d.*)\.conv(\d)\.norm\.", r"backbone.bottom_up.\1.bn\2."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"^backbone\.top_block", "fpn.top"),
    (r"^head\.cls_score", "head.classes"),
    (r"^head\.bbox_pred", "head.deltas"),
    (r"^proposal_generator\.rpn_head\.objectness_logits", "rpn.head.objectness"),
    (r"^proposal_generator\.rpn_head\.anchor_deltas", "rpn.head.deltas"),
    (r"^proposal_generator\.rpn_head", "rpn.head"),
    (r"^roi_heads\.box_predictor\.(\d\.)?cls_score", r"box_head.\1classes"),
    (r"^roi_heads\.box_predictor\.(\d\.)?bbox_pred", r"box_head.\1deltas"),
    (r"^roi_heads\.mask_head\.deconv", "mask_head.upsample"),
    (r"^roi_heads\.mask_head\.predictor", "mask_head.masks"),
)


def our_name(key: str, finest: int) -> str:
    """The name here of a parameter of detectron2; `finest` is the pyramid's first level, 2 or 3."""
    for pattern, name in _NAMES:
        key = re.sub(pattern, name, key)
    towers = {"cls": "class_convs", "bbox": "box_convs"}
    for pattern, renamed in (
        (r"^head\.(cls|bbox)_subnet\.(\d+)", lambda m: f"head.{towers[m[1]]}.{int(m[2]) // 2}.0"),
        (r"^backbone\.fpn_lateral(\d)", lambda m: f"fpn.laterals.{int(m[1]) - finest}.0"),
        (r"^backbone\.fpn_output(\d)", lambda m: f"fpn.outputs.{int(m[1]) - finest}.0"),
        (r"^backbone\.bottom_up\.res(\d)", lambda m: f"backbone.body.layer{int(m[1]) - 1}"),
        (r"^roi_heads\.box_head\.(\d\.)?fc(\d)", lambda m: f"box_head.{m[1] or ''}fcs.{int(m[2]) - 1}"),
        (r"^roi_heads\.mask_head\.mask_fcn(\d)", lambda m: f"mask_head.convs.{int(m[1]) - 1}.0"),
    ):
        key = re.sub(pattern, renamed, key)
    return key


def build(golden: Path, name: str, raw: dict[str, Any], finest: int = 2) -> Architecture:
    """The model of this section with the weights, pixel statistics and anchors of the golden model `name`."""
    model = build_model(SECTIONS[raw["type"]].model_validate(raw), CANVAS, NormConfig(type="frozen"))
    body: Any = model.backbone.body
    # timm's stem has 64 channels whatever the stages have; this model's has 8.
    body.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    body.bn1 = FrozenBatchNorm2d(8)
    body.layer1[0].conv1 = nn.Conv2d(8, 8, 1, bias=False)
    body.layer1[0].downsample[0] = nn.Conv2d(8, 32, 1, bias=False)
    weights = _module(golden / "weight_rule.py").load(golden / f"{name}.json")
    state = {our_name(key, finest): torch.from_numpy(value) for key, value in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith(("num_batches_tracked", "head.normalizer")) for key in missing), missing
    # detectron2 covers the padding of a batch with anchors; a fixed canvas leaves it out.
    for module in model.modules():
        if hasattr(module, "conventions"):
            module.conventions = dataclasses.replace(CONVENTIONS["detectron2"], anchors_in_padding=True)
    config = json.loads((golden / f"{name}.json").read_text())["config"]
    mean, std = config["PIXEL_MEAN"], config["PIXEL_STD"]
    model.pixel_scale = tuple(1 / s for s in std)
    model.pixel_shift = tuple(-m / s for m, s in zip(mean, std, strict=True))
    return model


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(golden: Path, *empty: int) -> Batch:
    """The two images with their objects; images `empty` lose theirs."""
    inputs = np.load(golden / "inputs_A.npz")
    side = max(CANVAS) + 2
    images = torch.zeros(2, 3, *CANVAS, dtype=torch.uint8)
    sizes = torch.zeros(2, 2)
    boxes, labels = torch.zeros(2, SLOTS, 4), torch.zeros(2, SLOTS, dtype=torch.int64)
    valid = torch.zeros(2, SLOTS, dtype=torch.bool)
    # Cells of one pixel, and one more around the image that repeats its edge.
    masks = torch.zeros(2, SLOTS, side, side, dtype=torch.uint8)
    frames = torch.zeros(2, SLOTS, 4)
    for i in range(2):
        image = torch.from_numpy(inputs[f"image.{i}"])
        height, width = image.shape[:2]
        images[i, :, :height, :width] = image.permute(2, 0, 1)
        sizes[i] = torch.tensor((height, width))
        count = 0 if i in empty else len(inputs[f"boxes.{i}"])
        boxes[i, :count] = torch.from_numpy(inputs[f"boxes.{i}"][:count])
        labels[i, :count] = torch.from_numpy(inputs[f"classes.{i}"][:count])
        valid[i, :count] = True
        bitmaps = np.pad(inputs[f"masks.{i}"][:count], ((0, 0), (1, 1), (1, 1)), "edge")
        masks[i, :count, : height + 2, : width + 2] = torch.from_numpy(bitmaps) * 255
        frames[i, :count] = torch.tensor([-1.0, -1.0, side - 1.0, side - 1.0])
    original = torch.from_numpy(np.stack([inputs[f"output_size.{i}"] for i in range(2)]))
    targets = Targets(boxes, labels, valid, masks, frames)
    return Batch(images, sizes, targets, torch.arange(2), torch.arange(2), original)


def norm(gradients: Iterable[Tensor | None]) -> float:
    """L2 norm over all tensors."""
    return float(torch.stack([g.double().norm() for g in gradients if g is not None]).norm())


def as_golden(losses: dict[str, Tensor], anchors: int) -> dict[str, Tensor]:
    """Losses with detectron2's divisor in the RPN: it counts slots that have no anchor, too."""
    rpn = anchors / RPN_SLOTS
    return {name: loss * rpn if "_rpn_" in name else loss for name, loss in losses.items()}


def assert_same_gradients(model: Any, loss: Tensor, expected: dict[str, float], rel: float) -> None:
    """Norms of the loss's gradients by detectron2's modules; the graph of the loss is kept."""
    model.zero_grad()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    heads = list(model.box_head) if isinstance(model.box_head, nn.ModuleList) else [model.box_head]
    modules: dict[str, list[nn.Module]] = {
        "backbone.bottom_up": [model.backbone],
        "backbone.fpn": [model.fpn],
        "proposal_generator": [model.rpn],
        "roi_heads.box_head": [head.fcs for head in heads],
        "roi_heads.box_predictor": [part for head in heads for part in (head.classes, head.deltas)],
        "roi_heads.mask_head": [model.mask_head],
    }
    found = {name: norm([p.grad for part in modules[name] for p in part.parameters()]) for name in expected}
    assert found == pytest.approx(expected, rel=rel)
    for name in modules.keys() - expected.keys():
        assert not any(p.grad.any() for m in modules[name] for p in m.parameters() if p.grad is not None)


def assert_same_gradient_of_each_parameter(model: Any, expected: dict[str, float], rel: float) -> None:
    """Norms of the gradients that a backward pass has left."""
    parameters = dict(model.named_parameters())
    found = {key: norm([parameters.pop(our_name(key, 2)).grad]) for key in expected}
    assert found == pytest.approx(expected, rel=rel) and not parameters


def same_boxes(ours_N4: Tensor, theirs_N4: Tensor, atol: float = 1e-2) -> Tensor:
    """Assert that the sets are equal; where each of theirs is among ours. Nearly equal scores may swap."""
    assert len(ours_N4) == len(theirs_N4)
    nearest_N, index_N = torch.cdist(theirs_N4.double(), ours_N4.double(), p=torch.inf).min(1)
    assert (nearest_N < atol).all(), f"{(nearest_N >= atol).sum()} boxes differ, by {nearest_N.max():.2g}"
    assert len(index_N.unique()) == len(index_N)
    return index_N


def assert_same_proposals(boxes_N4: Tensor, logits_N: Tensor, expected: Any, name: str) -> Tensor:
    """Boxes as a set and their logits; where each of the golden ones is among ours."""
    index_N = same_boxes(boxes_N4, torch.from_numpy(expected[f"{name}.boxes"]))
    theirs_N = torch.from_numpy(expected[f"{name}.logits"])
    torch.testing.assert_close(logits_N[index_N], theirs_N, atol=5e-4, rtol=1e-4)
    return index_N


def assert_same_detections(found: Detections, batch: Batch, expected: Any) -> None:
    """Boxes, classes, scores and mask probabilities, and the areas of pasted masks."""
    assert found.masks_BDSS is not None
    for i in range(2):
        valid_D = found.valid_BD[i]
        boxes_D4, labels_D = found.boxes_BD4[i][valid_D], found.labels_BD[i][valid_D]
        theirs = {
            key: torch.from_numpy(expected[f"det.{i}.{key}"])
            for key in ("boxes", "scores", "classes", "mask_probs")
        }
        # The class tells apart equal boxes.
        index_D = same_boxes(
            boxes_D4.double() + 1e5 * labels_D[:, None],
            theirs["boxes"].double() + 1e5 * theirs["classes"][:, None],
        )
        scores_D, masks_DSS = found.scores_BD[i][valid_D][index_D], found.masks_BDSS[i][valid_D][index_D]
        torch.testing.assert_close(scores_D, theirs["scores"], atol=1e-4, rtol=0)
        torch.testing.assert_close(masks_DSS, theirs["mask_probs"].float(), atol=1e-3, rtol=0)

        height, width = (int(n) for n in batch.original_sizes_B2[i])
        scale = (batch.original_sizes_B2[i] / batch.sizes_B2[i]).flip(0).repeat(2)
        scaled_D4 = boxes_D4[index_D] * scale
        torch.testing.assert_close(
            scaled_D4, torch.from_numpy(expected[f"post.{i}.boxes"]), atol=2e-2, rtol=0
        )
        pasted = paste_masks(masks_DSS, scaled_D4, height, width)
        areas = pasted.sum((1, 2)) - torch.from_numpy(expected[f"post.{i}.mask_areas"])
        assert areas.abs().max() <= 8, areas
        bits = torch.from_numpy(np.unpackbits(expected[f"post.{i}.mask_bits"], axis=-1))[..., :width]
        assert (pasted[: len(bits)] != bits.bool()).sum((1, 2)).max() <= 8
