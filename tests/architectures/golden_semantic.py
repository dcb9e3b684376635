"""Golden models of detectron2: their weights in our names, and the batch that they were run on."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from giantdet.architectures import Architecture
from giantdet.config.conventions import CONVENTIONS
from giantdet.layers.norm import FrozenBatchNorm2d
from giantdet.structures import IGNORE, Batch, Targets

CANVAS = (256, 320)
BACKBONE: dict[str, Any] = {"name": "resnet50", "timm_args": {"channels": [8, 16, 32, 64]}}
SLOTS, MARGIN, SIDE = 8, 8, 336  # of the masks' frames: the whole image and a border, a cell a pixel


def load_weights(golden: Path, name: str) -> dict[str, Tensor]:
    """{the reference's key: weight} of the model `name`, by the rule in the folder `golden`."""
    model_json = golden / f"{name}.json"
    spec = importlib.util.spec_from_file_location("weight_rule", golden / "weight_rule.py")
    assert spec is not None and spec.loader is not None
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    return {key: torch.from_numpy(value) for key, value in rule.load(model_json).items()}


def resnet_names(key: str) -> str:
    """Our name of a parameter of detectron2's ResNet with a pyramid from P2 on; other keys as they are."""
    for pattern, name in (
        (r"backbone\.bottom_up\.stem\.conv1\.norm", "backbone.body.bn1"),
        (r"backbone\.bottom_up\.stem\.conv1", "backbone.body.conv1"),
    ):
        key, found = re.subn(f"^{pattern}", name, key)
        if found:
            return key
    key = re.sub(r"^backbone\.fpn_lateral(\d)", lambda m: f"fpn.laterals.{int(m[1]) - 2}.0", key)
    key = re.sub(r"^backbone\.fpn_output(\d)", lambda m: f"fpn.outputs.{int(m[1]) - 2}.0", key)
    key = re.sub(r"^backbone\.bottom_up\.res(\d)", lambda m: f"backbone.body.layer{int(m[1]) - 1}", key)
    key = re.sub(r"\.conv(\d)\.norm\.", r".bn\1.", key)
    return key.replace(".shortcut.norm.", ".downsample.1.").replace(".shortcut.", ".downsample.0.")


def rcnn_names(key: str) -> str:
    """Our name of a parameter of detectron2's RPN, box and mask head; other keys as they are."""
    for pattern, name in (
        (r"proposal_generator\.rpn_head\.objectness_logits", "rpn.head.objectness"),
        (r"proposal_generator\.rpn_head\.anchor_deltas", "rpn.head.deltas"),
        (r"proposal_generator\.rpn_head\.conv", "rpn.head.conv"),
        (r"roi_heads\.box_predictor\.cls_score", "box_head.classes"),
        (r"roi_heads\.box_predictor\.bbox_pred", "box_head.deltas"),
        (r"roi_heads\.mask_head\.deconv", "mask_head.upsample"),
        (r"roi_heads\.mask_head\.predictor", "mask_head.masks"),
    ):
        key = re.sub(f"^{pattern}", name, key)
    key = re.sub(r"^roi_heads\.box_head\.fc(\d)", lambda m: f"box_head.fcs.{int(m[1]) - 1}", key)
    return re.sub(r"^roi_heads\.mask_head\.mask_fcn(\d)", lambda m: f"mask_head.convs.{int(m[1]) - 1}.0", key)


def semantic_names(key: str) -> str:
    """Our name of a parameter of detectron2's semantic head; other keys as they are."""
    key = key.replace("sem_seg_head.predictor.", "semantic_head.classes.")
    at = re.fullmatch(r"sem_seg_head\.p(\d)\.(\d)\.(norm\.)?(\w+)", key)
    if at is None:
        return key
    return f"semantic_head.levels.{int(at[1]) - 2}.{at[2]}.{1 if at[3] else 0}.{at[4]}"


def fill(
    model: Architecture, golden: Path, name: str, our_name: Callable[[str], str], caffe: bool = False
) -> None:
    """Give a model with `BACKBONE` and frozen norms the golden model's weights, pixel scale and conventions.

    `caffe`: pixels minus the mean and no more, in the order of the stored array.
    """
    body: Any = model.backbone.body
    # timm's stem has 64 channels whatever the stages have; this model's has 8.
    body.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    body.bn1 = FrozenBatchNorm2d(8)
    body.layer1[0].conv1 = nn.Conv2d(8, 8, 1, bias=False)
    body.layer1[0].downsample[0] = nn.Conv2d(8, 32, 1, bias=False)
    state = {our_name(key): value for key, value in load_weights(golden, name).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing), missing
    # detectron2 covers the padding of a batch with anchors; a fixed canvas leaves it out.
    conventions = dataclasses.replace(CONVENTIONS["detectron2"], anchors_in_padding=True)
    for module in model.modules():
        if hasattr(module, "conventions"):
            module.conventions = conventions
    mean = (103.53, 116.28, 123.675) if caffe else (123.675, 116.28, 103.53)
    std = (1.0, 1.0, 1.0) if caffe else (58.395, 57.12, 57.375)
    model.pixel_scale = tuple(1 / s for s in std)
    model.pixel_shift = tuple(-m / s for m, s in zip(mean, std, strict=True))


def load_batch(golden: Path, empty: int | None = None) -> Batch:
    """The two images; image `empty` loses its objects, and keeps its semantic map."""
    inputs = np.load(golden / "inputs_A.npz")
    images = torch.zeros(2, 3, *CANVAS, dtype=torch.uint8)
    sizes = torch.zeros(2, 2)
    targets = Targets(
        boxes_BM4=torch.zeros(2, SLOTS, 4),
        labels_BM=torch.zeros(2, SLOTS, dtype=torch.int64),
        valid_BM=torch.zeros(2, SLOTS, dtype=torch.bool),
        masks_BMSS=torch.zeros(2, SLOTS, SIDE, SIDE, dtype=torch.uint8),
        frames_BM4=torch.zeros(2, SLOTS, 4),
        semantic_BHW=torch.full((2, *CANVAS), IGNORE, dtype=torch.uint8),
    )
    for i in range(2):
        image = torch.from_numpy(inputs[f"image.{i}"])
        height, width = image.shape[:2]
        images[i, :, :height, :width] = image.permute(2, 0, 1)
        sizes[i] = torch.tensor((height, width))
        targets.semantic_BHW[i, :height, :width] = torch.from_numpy(inputs[f"sem_seg.{i}"])
        count = 0 if i == empty else len(inputs[f"boxes.{i}"])
        targets.boxes_BM4[i, :count] = torch.from_numpy(inputs[f"boxes.{i}"][:count])
        targets.labels_BM[i, :count] = torch.from_numpy(inputs[f"classes.{i}"][:count])
        targets.valid_BM[i, :count] = True
        border = ((MARGIN, SIDE - MARGIN - height), (MARGIN, SIDE - MARGIN - width))
        for n in range(count):  # what is outside of the image repeats its border
            mask = np.pad(inputs[f"masks.{i}"][n] * 255, border, mode="edge")
            targets.masks_BMSS[i, n] = torch.from_numpy(mask)
        targets.frames_BM4[i, :count] = torch.tensor([-MARGIN, -MARGIN, SIDE - MARGIN, SIDE - MARGIN]).float()
    original = torch.from_numpy(np.stack([inputs[f"output_size.{i}"] for i in range(2)])).long()
    return Batch(images, sizes, targets, torch.arange(2), torch.arange(2), original)


def grad_norms(parts: dict[str, nn.Module | list[nn.Module]]) -> dict[str, float]:
    """L2 norm of the gradients of each part."""
    found = {}
    for name, part in parts.items():
        modules = part if isinstance(part, list) else [part]
        grads = [p.grad for m in modules for p in m.parameters() if p.grad is not None]
        found[name] = float(torch.stack([g.double().norm() for g in grads]).norm())
    return found
