"""Semantic FPN against mmsegmentation's own model: the same weights, logits, losses and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden import load
from golden_mmseg import build, check_classes, check_maps, check_training

from giantdet.architectures import Architecture
from giantdet.architectures.semantic_fpn import SemanticFpn

NAME = "mmseg_semantic_fpn"
SECTION = {
    "type": "semantic_fpn",
    "fpn": {"channels": 32},
    "semantic_head": {"width": 32, "norm": "batch", "loss_divisor": "all"},
}


@pytest.fixture(scope="module")
def model(golden: Path) -> Architecture:
    return build(golden, NAME, SECTION)


def test_losses_and_gradients(model: SemanticFpn, golden: Path) -> None:
    parts = {"backbone": "backbone", "neck": "fpn", "decode_head": "semantic_head"}
    check_training(model, golden, NAME, parts)


@torch.no_grad()
def test_maps_and_logits(model: SemanticFpn, golden: Path) -> None:
    batch, arrays = load(golden), np.load(golden / f"mm/{NAME}_A.npz")
    maps = model.eval().backbone(model.normalise(batch.images_B3HW, batch.sizes_B2))
    check_maps(maps, arrays, "backbone")
    check_maps(model.fpn(maps), arrays, "neck")
    check_classes(model(batch).semantic_BCHW, arrays)
