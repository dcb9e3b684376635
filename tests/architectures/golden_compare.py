"""Comparisons of a model's outputs, losses and gradients with those of a golden model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from golden import RPN_SLOTS, GoldenStep
from pasting import paste_masks
from torch import Tensor, nn

from giantdet.architectures import total_loss
from giantdet.architectures.foreign.detectron2 import DETECTRON2
from giantdet.structures import Batch, Detections


def norm(gradients: Iterable[Tensor | None]) -> float:
    """Return the L2 norm over all tensors."""
    return float(torch.stack([g.double().norm() for g in gradients if g is not None]).norm())


def as_golden(losses: dict[str, Tensor], anchors: int) -> dict[str, Tensor]:
    """Return the losses with detectron2's divisor in the RPN, which also counts slots without an anchor."""
    rpn = anchors / RPN_SLOTS
    return {name: loss * rpn if "_rpn_" in name else loss for name, loss in losses.items()}


def modules_by_golden_name(model: Any) -> dict[str, list[nn.Module]]:
    """Return the modules of a model by detectron2's names for them."""
    name = "backbone.net" if model.backbone.is_plain else "backbone.bottom_up"
    found = {name: [model.backbone], "backbone.fpn": [model.fpn]}
    for name, attribute in (
        ("proposal_generator", "rpn"),
        ("roi_heads.mask_head", "mask_head"),
        ("sem_seg_head", "semantic_head"),
        ("head", "head"),
    ):
        if hasattr(model, attribute):
            found[name] = [getattr(model, attribute)]
    if hasattr(model, "box_head"):
        heads = list(model.box_head) if isinstance(model.box_head, nn.ModuleList) else [model.box_head]
        found["roi_heads.box_head"] = [part for head in heads for part in (head.convs, head.fcs)]
        found["roi_heads.box_predictor"] = [part for head in heads for part in (head.classes, head.deltas)]
    return found


def assert_same_step(
    model: Any,
    losses: dict[str, Tensor],
    expected: GoldenStep,
    rel: float = 1e-4,
    parameter_rel: float = 1e-4,
) -> None:
    """Compare losses, the gradient norms of each loss by module, and those of the total by parameter.

    The losses agree to a relative 1e-4, the norms of modules to `rel` and those of parameters to
    `parameter_rel`.
    """
    found = {name: float(loss.detach()) for name, loss in losses.items()}
    assert found == pytest.approx(expected.losses, rel=1e-4)
    for name, norms in expected.grad_norms.items():
        if name != "total":
            assert_same_gradients(model, losses[name], norms, rel)
    assert_same_gradients(model, total_loss(losses), expected.grad_norms["total"], rel)
    if expected.per_parameter:
        assert_same_gradient_of_each_parameter(model, expected.per_parameter, parameter_rel)


def assert_same_gradients(model: Any, loss: Tensor, expected: dict[str, float], rel: float) -> None:
    """Compare the norms of the loss's gradients by module; the graph of the loss is kept."""
    model.zero_grad()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    modules = modules_by_golden_name(model)
    found = {name: norm([p.grad for part in modules[name] for p in part.parameters()]) for name in expected}
    assert found == pytest.approx(expected, rel=rel)
    for name in modules.keys() - expected.keys():
        assert not any(p.grad.any() for m in modules[name] for p in m.parameters() if p.grad is not None)


def assert_same_gradient_of_each_parameter(model: Any, expected: dict[str, float], rel: float) -> None:
    """Compare the norms of the gradients left by a backward pass."""
    parameters = dict(model.named_parameters())
    names = DETECTRON2.names(expected)
    found = {key: norm([parameters.pop(names[key]).grad]) for key in expected}
    assert found == pytest.approx(expected, rel=rel) and not parameters


def same_boxes(ours_N4: Tensor, theirs_N4: Tensor, atol: float = 1e-2) -> Tensor:
    """Assert that the sets are equal; return the index of each of theirs in ours. Near ties may swap."""
    assert len(ours_N4) == len(theirs_N4)
    nearest_N, index_N = torch.cdist(theirs_N4.double(), ours_N4.double(), p=torch.inf).min(1)
    assert (nearest_N < atol).all(), f"{(nearest_N >= atol).sum()} boxes differ, by {nearest_N.max():.2g}"
    assert len(index_N.unique()) == len(index_N)
    return index_N


def assert_same_features(maps: list[Tensor], expected: Any, names: list[str]) -> None:
    """Compare means and standard deviations by channel, and the first channels, of the maps `names`."""
    for level, name in zip(maps, names, strict=True):
        first = torch.from_numpy(expected[f"{name}.slice"])
        for ours, part in (
            (level.mean((2, 3)), "mean"),
            (level.std((2, 3), correction=0), "std"),
            (level[:, : first.shape[1]], "slice"),
        ):
            theirs = torch.from_numpy(expected[f"{name}.{part}"])
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def assert_same_proposals(model: Any, batch: Batch, expected: Any) -> None:
    """Compare the sets of proposals and their logits, in evaluation and in training mode."""
    with torch.no_grad():
        for training, name in ((False, "proposals"), (True, "train_proposals")):
            model.train(training)
            proposals, _ = model.rpn(model.pyramid(batch), batch.sizes_B2, None, batch.seeds_B)
            assert proposals.valid_BN.all()
            for i in range(2):
                index_N = same_boxes(proposals.boxes_BN4[i], torch.from_numpy(expected[f"{name}.{i}.boxes"]))
                theirs_N = torch.from_numpy(expected[f"{name}.{i}.logits"])
                torch.testing.assert_close(proposals.scores_BN[i][index_N], theirs_N, atol=1e-4, rtol=1e-4)


def assert_same_detections(found: Detections, batch: Batch, expected: Any) -> None:
    """Compare boxes, classes, scores and mask probabilities, and the areas of pasted masks."""
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
