"""RetinaNet against detectron2's own model: the same weights, the same outputs, losses and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import BACKBONE, build, golden_step, in_double, load
from golden_compare import assert_same_step
from torch.utils._pytree import tree_flatten

from giantdet.architectures import build_model, total_loss
from giantdet.architectures.retinanet import RetinaNet
from giantdet.config.architectures.retinanet import RetinaNetConfig
from giantdet.errors import InputError


@pytest.fixture(scope="module")
def model(golden: Path) -> RetinaNet:
    raw = {
        "type": "retinanet",
        "num_classes": 5,
        "backbone": BACKBONE,
        "fpn": {"channels": 32},
        "head": {"convs": 2, "detections": 60},
    }
    built = build(golden, "retinanet", raw)
    assert isinstance(built, RetinaNet)
    return built


@pytest.mark.parametrize("empty", [(), (1,)])
def test_losses_and_gradients(model: RetinaNet, golden: Path, empty: tuple[int, ...]) -> None:
    expected = golden_step(golden, "retinanet", empty)
    model = in_double(model).train()
    with torch.no_grad():
        model.head.normalizer.fill_(100.0)
    batch = load(golden, *empty)
    predictions = model(batch)
    losses = model.losses(predictions, batch)
    assert float(model.counts(predictions)["anchors_positive"]) == expected.counts["num_pos_anchors"]
    assert float(model.head.normalizer) == pytest.approx(expected.whole["loss_normalizer"], rel=1e-6)
    assert_same_step(model, losses, expected)


@torch.no_grad()
def test_detections(model: RetinaNet, golden: Path) -> None:
    """Post-processed: scaled to the requested size, clipped, without boxes in the padding."""
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
    batch = load(golden, 0, 1)
    model.train().zero_grad()
    predictions = model(batch)
    losses = model.losses(predictions, batch)
    assert losses["loss_box_reg"] == 0 and losses["loss_cls"] > 0
    total_loss(losses).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(t.isfinite().all() for t in tree_flatten(predictions)[0])


def test_p6_from_p5_and_plain_backbones() -> None:
    """Levels at strides 8 to 128 of a convolutional and a plain backbone, on a canvas with odd halves."""
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
