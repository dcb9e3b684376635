"""Golden models of detectron2, rebuilt here with the same weights, and the batch used for them."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from giantdet.architectures import Architecture, build_model
from giantdet.architectures.foreign.detectron2 import DETECTRON2
from giantdet.config.architectures import SECTIONS
from giantdet.config.architectures.common import NormConfig
from giantdet.config.conventions import CONVENTIONS
from giantdet.layers.norm import moving_norms
from giantdet.structures import IGNORE, Batch, Targets

M = TypeVar("M", bound=nn.Module)
CANVAS = (256, 320)
SLOTS = 8
BACKBONE: dict[str, Any] = {"name": "resnet50", "timm_args": {"channels": [8, 16, 32, 64]}}
# The number of samples by which detectron2 divides its RPN losses: larger than the number of anchors.
RPN_SLOTS = 32768
RPN: dict[str, Any] = {
    "batch_per_image": RPN_SLOTS,
    "positive_fraction": 1.0,
    "pre_nms_train": 1000,
    "pre_nms_test": 200,
    "post_nms_train": 300,
    "post_nms_test": 100,
}
RCNN: dict[str, Any] = {
    "num_classes": 5,
    "backbone": {**BACKBONE, "stride_in_1x1": True},
    "fpn": {"channels": 32},
    "rpn": RPN,
    "mask_head": {"convs": 2, "width": 32, "sampling_ratio": 0, "slots": 100},
}
BOX_HEAD: dict[str, Any] = {
    "width": 64,
    "sampling_ratio": 0,
    "batch_per_image": 4096,
    "positive_fraction": 1.0,
    "score_threshold": 0.2,
    "detections": 60,
}


def build(
    golden: Path,
    name: str,
    raw: dict[str, Any],
    canvas: tuple[int, int] = CANVAS,
    norm: Literal["frozen", "local"] = "frozen",
) -> Architecture:
    """Return this section's model with the weights, pixel statistics and anchors of golden model `name`."""
    model = build_model(SECTIONS[raw["type"]].model_validate(raw), canvas, NormConfig(type=norm))
    if raw["backbone"]["name"] == BACKBONE["name"]:
        narrow_stem(model.backbone.body)
    state = DETECTRON2.convert(load_weights(golden, name), bgr=False).state
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(key.endswith(("num_batches_tracked", "head.normalizer")) for key in missing), missing
    # detectron2 covers the padding of a batch with anchors; a fixed canvas leaves it out.
    for module in model.modules():
        if hasattr(module, "conventions"):
            module.conventions = dataclasses.replace(CONVENTIONS["detectron2"], anchors_in_padding=True)
    description = json.loads((golden / f"{name}.json").read_text())
    # Models with a Python configuration (ViTDet's) have everything in their overrides.
    config = description["config"] or {key.upper(): v for key, v in description["overrides"].items()}
    mean, std = config["PIXEL_MEAN"], config["PIXEL_STD"]
    model.pixel_scale = tuple(1 / s for s in std)
    model.pixel_shift = tuple(-m / s for m, s in zip(mean, std, strict=True))
    return model


def in_double(model: M) -> M:
    """Return a copy in float64, for gradients that do not depend on how a processor rounds.

    In float32 the gradient norms of ViTDet's modules differ by up to 9e-4 between processors, those of single
    parameters by up to 3e-3.
    """
    return copy.deepcopy(model).double()


def with_frozen_statistics(model: Architecture) -> Any:
    """Return a copy in float64 that trains, except for its BatchNorms (`norm_eval`)."""
    model = in_double(model).train()
    for batch_norm in moving_norms(model):
        batch_norm.eval()
    return model


def narrow_stem(body: Any) -> None:
    """Replace the stem by one of 8 channels: timm's has 64 at every width."""
    body.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    body.bn1 = type(body.bn1)(8)
    body.layer1[0].conv1 = nn.Conv2d(8, 8, 1, bias=False)
    body.layer1[0].downsample[0] = nn.Conv2d(8, 32, 1, bias=False)


def load_weights(golden: Path, name: str) -> dict[str, Tensor]:
    """Return {the reference's key: weight} of the model `name`, by the rule given in the folder `golden`."""
    spec = importlib.util.spec_from_file_location("weight_rule", golden / "weight_rule.py")
    assert spec is not None and spec.loader is not None
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    return {key: torch.from_numpy(value) for key, value in rule.load(golden / f"{name}.json").items()}


def load(golden: Path, *empty: int, canvas: tuple[int, int] = CANVAS) -> Batch:
    """Return the two images with their targets; images `empty` lose their objects, not their semantic map."""
    inputs = np.load(golden / "inputs_A.npz")
    side = max(canvas) + 2
    images = torch.zeros(2, 3, *canvas, dtype=torch.uint8)
    sizes = torch.zeros(2, 2)
    targets = Targets(
        boxes_BM4=torch.zeros(2, SLOTS, 4),
        labels_BM=torch.zeros(2, SLOTS, dtype=torch.int64),
        valid_BM=torch.zeros(2, SLOTS, dtype=torch.bool),
        # One-pixel cells; one more around the image repeats its edge.
        masks_BMSS=torch.zeros(2, SLOTS, side, side, dtype=torch.uint8),
        frames_BM4=torch.zeros(2, SLOTS, 4),
        semantic_BHW=torch.full((2, *canvas), IGNORE, dtype=torch.uint8),
    )
    for i in range(2):
        image = torch.from_numpy(inputs[f"image.{i}"])
        height, width = image.shape[:2]
        images[i, :, :height, :width] = image.permute(2, 0, 1)
        sizes[i] = torch.tensor((height, width))
        count = 0 if i in empty else len(inputs[f"boxes.{i}"])
        targets.boxes_BM4[i, :count] = torch.from_numpy(inputs[f"boxes.{i}"][:count])
        targets.labels_BM[i, :count] = torch.from_numpy(inputs[f"classes.{i}"][:count])
        targets.valid_BM[i, :count] = True
        border = ((0, 0), (1, side - 1 - height), (1, side - 1 - width))
        bitmaps = np.pad(inputs[f"masks.{i}"][:count], border, "edge")
        targets.masks_BMSS[i, :count] = torch.from_numpy(bitmaps) * 255
        targets.frames_BM4[i, :count] = torch.tensor([-1.0, -1.0, side - 1.0, side - 1.0])
        targets.semantic_BHW[i, :height, :width] = torch.from_numpy(inputs[f"sem_seg.{i}"])
    original = torch.from_numpy(np.stack([inputs[f"output_size.{i}"] for i in range(2)])).long()
    return Batch(images, sizes, targets, torch.arange(2), torch.arange(2), original)


class GoldenStep(NamedTuple):
    """The results of a golden model's first training step."""

    losses: dict[str, float]
    counts: dict[str, float]  # means over the two images
    grad_norms: dict[str, dict[str, float]]  # of each loss and of the total, by module
    per_parameter: dict[str, float]  # of the total's gradients, by detectron2's key
    whole: dict[str, Any]  # all values of the file


def golden_step(golden: Path, name: str, empty: tuple[int, ...] = ()) -> GoldenStep:
    """Return the step of golden model `name`; `empty` (1,) selects the batch whose image 1 has no objects."""
    whole = json.loads((golden / f"{name}_A.json").read_text())
    if not empty:
        per_parameter = whole["grad_norm_per_parameter"]
        return GoldenStep(whole["losses"], whole["counts"], whole["grad_norms"], per_parameter, whole)
    assert empty == (1,)
    whole = whole["second_image_without_objects"]
    return GoldenStep(whole["losses"], whole["counts"], {"total": whole["grad_norms_total"]}, {}, whole)
