"""RetinaNet against detectron2's own model: the same weights, the same answers, losses and gradients."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from giantdet.architectures import build_model, total_loss
from giantdet.architectures.retinanet import RetinaNet
from giantdet.config.architectures.common import NormConfig
from giantdet.config.architectures.retinanet import RetinaNetConfig
from giantdet.config.conventions import CONVENTIONS
from giantdet.errors import InputError
from giantdet.layers.norm import FrozenBatchNorm2d
from giantdet.structures import Batch, Targets

CANVAS = (256, 320)


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_name(key: str) -> str:
    """The name here of a parameter of detectron2's RetinaNet with a ResNet."""
    tower = re.fullmatch(r"head\.(cls|bbox)_subnet\.(\d+)\.(\w+)", key)
    if tower:
        convs = {"cls": "class_convs", "bbox": "box_convs"}[tower[1]]
        return f"head.{convs}.{int(tower[2]) // 2}.0.{tower[3]}"
    for pattern, name in (
        (r"head\.cls_score", "head.classes"),
        (r"head\.bbox_pred", "head.deltas"),
        (r"backbone\.top_block", "fpn.top"),
        (r"backbone\.bottom_up\.stem\.conv1\.norm", "backbone.body.bn1"),
        (r"backbone\.bottom_up\.stem\.conv1", "backbone.body.conv1"),
    ):
        key, found = re.subn(f"^{pattern}", name, key)
        if found:
            return key
    key = re.sub(r"^backbone\.fpn_lateral(\d)", lambda m: f"fpn.laterals.{int(m[1]) - 3}.0", key)
    key = re.sub(r"^backbone\.fpn_output(\d)", lambda m: f"fpn.outputs.{int(m[1]) - 3}.0", key)
    key = re.sub(r"^backbone\.bottom_up\.res(\d)", lambda m: f"backbone.body.layer{int(m[1]) - 1}", key)
    key = re.sub(r"\.conv(\d)\.norm\.", r".bn\1.", key)
    return key.replace(".shortcut.norm.", ".downsample.1.").replace(".shortcut.", ".downsample.0.")


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden/models"


@pytest.fixture(scope="module")
def model(golden: Path) -> RetinaNet:
    config = RetinaNetConfig.model_validate(
        {
            "type": "retinanet",
            "num_classes": 5,
            "backbone": {
                "name": "resnet50",
                "timm_args": {"channels": [8, 16, 32, 64]},
            },
            "fpn": {"channels": 32},
            "head": {"convs": 2, "detections": 60},
        }
    )
    built = build_model(config, CANVAS, NormConfig(type="frozen"))
    assert isinstance(built, RetinaNet)
    body = built.backbone.body
    # timm's stem has 64 channels whatever the stages have; this model's has 8.
    body.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    body.bn1 = FrozenBatchNorm2d(8)
    body.layer1[0].conv1 = nn.Conv2d(8, 8, 1, bias=False)
    body.layer1[0].downsample[0] = nn.Conv2d(8, 32, 1, bias=False)
    weights = _module(golden / "weight_rule.py").load(golden / "retinanet.json")
    state = {our_name(key): torch.from_numpy(value) for key, value in weights.items()}
    missing, unexpected = built.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith(("num_batches_tracked", "head.normalizer")) for key in missing)
    # detectron2 covers the padding of a batch with anchors; a fixed canvas leaves it out.
    built.conventions = dataclasses.replace(CONVENTIONS["detectron2"], anchors_in_padding=True)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    built.pixel_scale = tuple(1 / s for s in std)
    built.pixel_shift = tuple(-m / s for m, s in zip(mean, std, strict=True))
    return built


def load(golden: Path, empty: int | None = None) -> Batch:
    """The two images; image `empty` loses its objects."""
    inputs = np.load(golden / "inputs_A.npz")
    images = torch.zeros(2, 3, *CANVAS, dtype=torch.uint8)
    sizes, slots = torch.zeros(2, 2), 8
    boxes, labels = torch.zeros(2, slots, 4), torch.zeros(2, slots, dtype=torch.int64)
    valid = torch.zeros(2, slots, dtype=torch.bool)
    for i in range(2):
        image = torch.from_numpy(inputs[f"image.{i}"])
        images[i, :, : image.shape[0], : image.shape[1]] = image.permute(2, 0, 1)
        sizes[i] = torch.tensor(image.shape[:2])
        count = 0 if i == empty else len(inputs[f"boxes.{i}"])
        boxes[i, :count] = torch.from_numpy(inputs[f"boxes.{i}"][:count])
        labels[i, :count] = torch.from_numpy(inputs[f"classes.{i}"][:count])
        valid[i, :count] = True
    targets = Targets(
        boxes, labels, valid, torch.zeros(2, slots, 0, 0, dtype=torch.uint8), torch.zeros(2, slots, 4)
    )
    original = torch.from_numpy(np.stack([inputs[f"output_size.{i}"] for i in range(2)]))
    return Batch(images, sizes, targets, torch.arange(2), torch.arange(2), original)


def _norm(tensors: list[Tensor | None]) -> float:
    return float(torch.stack([t.double().norm() for t in tensors if t is not None]).norm())


@pytest.mark.parametrize("empty", [None, 1])
def test_losses_and_gradients(model: RetinaNet, golden: Path, empty: int | None) -> None:
    expected = json.loads((golden / "retinanet_A.json").read_text())
    norms = expected["grad_norms"]["total"] if empty is None else None
    if empty is not None:
        expected = expected["second_image_without_objects"]
        norms = expected["grad_norms_total"]
    model.train().zero_grad()
    with torch.no_grad():
        model.head.normalizer.fill_(100.0)
    batch = load(golden, empty)
    predictions = model(batch)
    losses = model.losses(predictions, batch)
    assert float(model.counts(predictions)["anchors_positive"]) == expected["counts"]["num_pos_anchors"]
    assert float(model.head.normalizer) == pytest.approx(expected["loss_normalizer"], rel=1e-6)
    assert {name: float(loss) for name, loss in losses.items()} == pytest.approx(expected["losses"], rel=1e-4)
    total_loss(losses).backward()  # type: ignore[no-untyped-call]
    found = {
        "backbone.bottom_up": _norm([p.grad for p in model.backbone.parameters()]),
        "backbone.fpn": _norm([p.grad for p in model.fpn.parameters()]),
        "head": _norm([p.grad for p in model.head.parameters()]),
    }
    assert found == pytest.approx(norms, rel=1e-4)


@torch.no_grad()
def test_detections(model: RetinaNet, golden: Path) -> None:
    """After post-processing: scaled to the asked size, clipped, boxes in the padding left out."""
    expected, batch = np.load(golden / "retinanet_A.npz"), load(golden)
    found = model.eval()(batch).detections
    for i in range(2):
        chosen = found.valid_BD[i]
        scale = (batch.original_sizes_B2[i] / batch.sizes_B2[i]).flip(0).repeat(2)
        boxes = found.boxes_BD4[i][chosen] * scale
        scores, labels = found.scores_BD[i][chosen], found.labels_BD[i][chosen]
        assert len(scores) == len(expected[f"post.{i}.scores"])
        assert labels.tolist() == expected[f"post.{i}.classes"].tolist()
        torch.testing.assert_close(scores, torch.from_numpy(expected[f"post.{i}.scores"]), atol=1e-4, rtol=0)
        torch.testing.assert_close(boxes, torch.from_numpy(expected[f"post.{i}.boxes"]), atol=1e-2, rtol=0)


def test_a_batch_without_objects_has_clean_gradients(model: RetinaNet, golden: Path) -> None:
    batch = load(golden)
    nothing = batch.targets._replace(valid_BM=torch.zeros_like(batch.targets.valid_BM))
    batch = batch._replace(targets=nothing)
    model.train().zero_grad()
    predictions = model(batch)
    losses = model.losses(predictions, batch)
    assert losses["loss_box_reg"] == 0 and losses["loss_cls"] > 0
    total_loss(losses).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(t.isfinite().all() for t in tree_flatten(predictions)[0])


def test_p6_from_p5_and_plain_backbones() -> None:
    """Levels at strides 8 to 128 of a convolutional and a plain backbone; the canvas halves unevenly."""
    plain = {"name": "vit_tiny_patch16_224", "window": 0}
    for backbone, source in (({"name": "test_resnet"}, "c5"), ({"name": "test_resnet"}, "p5"), (plain, None)):
        levels = _small(backbone, source).pyramid(torch.zeros(1, 3, 96, 160))
        assert [tuple(level.shape[2:]) for level in levels] == [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
    with pytest.raises(InputError, match="a plain ViT has no C5"):
        _small(plain, "c5")


def _small(backbone: dict[str, Any], source: str | None) -> RetinaNet:
    raw = {
        "type": "retinanet",
        "num_classes": 3,
        "backbone": backbone,
        "fpn": {"channels": 8},
        "extra_levels_from": source,
        "head": {"convs": 1, "pre_nms": 50, "detections": 10},
    }
    model = build_model(RetinaNetConfig.model_validate(raw), (96, 160)).eval()
    assert isinstance(model, RetinaNet)
    return model
