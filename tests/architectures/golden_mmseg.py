"""Golden models of mmsegmentation: their weights under our names, and comparisons with their outputs.

Tolerances are a relative 1e-4; for an array, relative to its largest value. A change of 1e-6 on every weight
changes the arrays by at most 2e-5 and the gradient norms of modules by at most 7e-5 (`mmseg_*_A_noise.json`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import CANVAS, load, load_weights, with_frozen_statistics
from golden_compare import norm
from torch import Tensor

from giantdet.architectures import Architecture, build_model, total_loss
from giantdet.architectures.foreign.mmsegmentation import MMSEGMENTATION
from giantdet.config.architectures import SECTIONS
from giantdet.config.architectures.common import NormConfig
from giantdet.layers.semantic_head import to_canvas

# mmsegmentation uses ResNetV1c: three 3x3 convolutions in the stem.
BACKBONE: dict[str, Any] = {
    "name": "resnet50c",
    "timm_args": {"stem_width": 4, "channels": [8, 16, 32, 64]},
}
TOLERANCE = 1e-4


def build(golden: Path, name: str, section: dict[str, Any]) -> Architecture:
    """The model of this section with mmsegmentation's weights, its BatchNorms trainable."""
    config = SECTIONS[section["type"]].model_validate({"num_classes": 7, "backbone": BACKBONE, **section})
    model = build_model(config, CANVAS, NormConfig(type="local"))
    model.load_state_dict(MMSEGMENTATION.convert(load_weights(golden, f"mm/{name}")).state)
    return model


def check_training(model: Architecture, golden: Path, name: str, parts: dict[str, str]) -> None:
    """Assert equal losses, gradient norms of the `parts` {theirs: ours} and of each parameter."""
    expected = json.loads((golden / f"mm/{name}_A.json").read_text())
    model = with_frozen_statistics(model)
    batch = load(golden)
    losses = model.losses(model(batch), batch)
    names = {"loss_sem_seg": "decode.loss_ce", "loss_sem_seg_aux": "aux.loss_ce"}
    found = {names[key]: float(loss.detach()) for key, loss in losses.items()}
    assert found == pytest.approx(expected["losses"], rel=TOLERANCE)
    total_loss(losses).backward()  # type: ignore[no-untyped-call]
    norms = {
        theirs: norm(p.grad for p in model.get_submodule(ours).parameters()) for theirs, ours in parts.items()
    }
    assert norms == pytest.approx(expected["grad_norms"]["total"], rel=TOLERANCE)
    ours = dict(model.named_parameters())
    our_names = MMSEGMENTATION.names(expected["grad_norm_per_parameter"])
    each = {key: ours[name].grad for key, name in our_names.items()}
    assert len(each) == len(ours)
    found = {key: float(grad.norm()) for key, grad in each.items() if grad is not None}
    assert found == pytest.approx(expected["grad_norm_per_parameter"], rel=TOLERANCE)


def check_maps(maps: list[Tensor], arrays: Any, name: str) -> None:
    """Assert equal means and deviations of all channels, and equal first channels."""
    for number, level in enumerate(maps[:4]):
        close(level.mean((2, 3)), arrays[f"{name}.{number}.mean"])
        close(level.std((2, 3), correction=0), arrays[f"{name}.{number}.std"])
        first = arrays[f"{name}.{number}.slice"]
        close(level[:, : first.shape[1]], first)


def check_classes(logits_BChw: Tensor, arrays: Any) -> None:
    """Assert equal logits at stride 4, and equal classes of all pixels of the canvas but a few."""
    close(logits_BChw, arrays["logits"])
    wrong = to_canvas(logits_BChw).argmax(1).numpy() != arrays["argmax"]
    assert wrong.mean() < TOLERANCE


def close(found: Tensor, expected: np.ndarray[Any, Any]) -> None:
    """Assert equality up to the tolerance, relative to the largest value."""
    largest = float(np.abs(expected).max())
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=TOLERANCE * largest, rtol=0)
