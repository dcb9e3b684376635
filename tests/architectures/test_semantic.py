"""Semantic FPN against detectron2's own model: the same weights, the same logits, losses and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import BACKBONE, build, golden_step, in_double, load
from golden_compare import assert_same_step
from test_trace import Recorder
from torch.utils._pytree import tree_flatten

from giantdet.architectures import Architecture, build_model, total_loss
from giantdet.architectures.semantic_fpn import SemanticFpn
from giantdet.config.architectures.semantic_fpn import SemanticFpnConfig
from giantdet.layers.semantic_head import to_canvas
from giantdet.structures import IGNORE, Batch, Targets


@pytest.fixture(scope="module")
def model(golden: Path) -> SemanticFpn:
    raw = {
        "type": "semantic_fpn",
        "num_classes": 7,
        "backbone": BACKBONE,
        "fpn": {"channels": 32},
        "semantic_head": {"width": 64},
    }
    built = build(golden, "semantic", raw)
    assert isinstance(built, SemanticFpn)
    return built


def test_losses_and_gradients(model: SemanticFpn, golden: Path) -> None:
    batch = load(golden)
    model = in_double(model).train()
    predictions = model(batch)
    assert_same_step(model, model.losses(predictions, batch), golden_step(golden, "semantic"))
    pixels = model.counts(predictions)["labelled_pixels"]
    assert float(pixels) == float((batch.targets.semantic_BHW != IGNORE).sum() / 2)


@torch.no_grad()
def test_logits(model: SemanticFpn, golden: Path) -> None:
    expected = np.load(golden / "semantic_A.npz")
    found = model.eval()(load(golden)).semantic_BCHW
    torch.testing.assert_close(found, torch.from_numpy(expected["sem.logits_stride4"]), atol=2e-4, rtol=0)
    wrong = to_canvas(found).argmax(1) != torch.from_numpy(expected["sem.argmax_padded"])
    assert wrong.float().mean() < 2e-4


@pytest.mark.parametrize("divisor", ["labelled", "all"])
def test_no_labelled_pixel(model: SemanticFpn, golden: Path, divisor: Any) -> None:
    """A crop that is ignored everywhere gives a loss of 0, and gradients of 0 for every parameter."""
    batch = all_ignored(load(golden))
    model.loss_divisor = divisor
    losses = train_step(model, batch)
    model.loss_divisor = "labelled"
    assert losses == {"loss_sem_seg": 0.0}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    predictions = model(batch)
    assert model.counts(predictions)["labelled_pixels"] == 0
    assert all(t.isfinite().all() for t in tree_flatten(predictions)[0])


def test_a_step_never_synchronises_with_the_device(model: SemanticFpn, golden: Path) -> None:
    batch = load(golden)
    with Recorder() as recorder:
        total_loss(model.train().losses(model(batch), batch)).backward()  # type: ignore[no-untyped-call]
        model.eval()(batch)
    assert not recorder.broken and "aten::upsample_bilinear2d" in recorder.names


def test_one_graph(model: SemanticFpn, golden: Path) -> None:
    """The forward pass and the losses compile without a graph break and give the same numbers."""
    batch = load(golden)

    def losses_of() -> dict[str, torch.Tensor]:
        return model.losses(model(batch), batch)

    model.train()
    torch._dynamo.reset()
    compiled = torch.compile(losses_of, backend="eager", fullgraph=True, dynamic=False)()
    torch.testing.assert_close(compiled, losses_of(), rtol=1e-5, atol=0)


def noise(size: tuple[int, int], classes: int) -> Batch:
    """Two images without objects and with a class for each pixel."""
    none = torch.zeros(2, 0)
    labels = torch.randint(0, classes, (2, *size), dtype=torch.uint8)
    targets = Targets(none.view(2, 0, 4), none.long(), none.bool(), none.view(2, 0, 0, 0), none, labels)
    images = torch.randint(0, 255, (2, 3, *size), dtype=torch.uint8)
    hw = torch.tensor([size, size])
    return Batch(images, hw.float(), targets, torch.arange(2), torch.arange(2), hw)


def all_ignored(batch: Batch) -> Batch:
    """The batch without a labelled pixel."""
    ignored = torch.full_like(batch.targets.semantic_BHW, IGNORE)
    return batch._replace(targets=batch.targets._replace(semantic_BHW=ignored))


def train_step(model: Architecture, batch: Batch) -> dict[str, float]:
    """Return the losses of one step, after which every parameter has a finite gradient."""
    model.train().zero_grad()
    losses = model.losses(model(batch), batch)
    total_loss(losses).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    return {name: float(loss.detach()) for name, loss in losses.items()}


BACKBONES: dict[str, dict[str, Any]] = {
    "plain ViT": {"name": "vit_tiny_patch16_224", "timm_args": {"depth": 2}, "window": 2, "global_blocks": 1},
    "Swin": {
        "name": "swin_tiny_patch4_window7_224",
        "timm_args": {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
    },
    "ConvNeXt": {"name": "convnext_atto", "timm_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}},
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name: str) -> None:
    """Every parameter is trained, with recomputed activations and the head's norms over the batch."""
    raw = {
        "type": "semantic_fpn",
        "num_classes": 3,
        "backbone": BACKBONES[name],
        "fpn": {"channels": 8, "norm": "layer"},
        "semantic_head": {"width": 16, "norm": "batch", "dropout": 0.1},
        "checkpoint_heads": True,
    }
    config = SemanticFpnConfig.model_validate(raw)
    assert not list(config.problems()) and config.batch_norms()["heads"] == ("model.semantic_head", True)
    model, batch = build_model(config, (64, 96)), noise((64, 96), classes=3)
    train_step(model, batch)
    assert all(p.grad is not None and p.grad.any() for p in model.semantic_head.parameters())
    assert model.eval()(batch).semantic_BCHW.shape == (2, 3, 16, 24)
