"""The semantic branch of two-stage detectors: labels, loss, head and embedding against hand-written code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_detector import build, load, scenes, step  # noqa: F401
from tiny import tiny_run
from torch import Tensor

from giantdet.architectures.base import total_loss
from giantdet.config.architectures import SECTIONS
from giantdet.config.load import parse_run
from giantdet.config.resolve import resolve
from giantdet.data.coco_panoptic import CocoPanopticDataset
from giantdet.data.dataset import open_dataset
from giantdet.errors import ConfigError
from giantdet.layers.roi_pool import RoiMaps
from giantdet.layers.semantic_branch import NO_CLASS, BranchPredictions, branch_loss
from giantdet.structures import IGNORE

KINDS = ("mask_rcnn", "cascade_mask_rcnn")


def branched(kind: str = "mask_rcnn", seed: int = 0, **section: Any) -> Any:
    changes = {"enabled": True, "convs": 2, "width": 12, **section}
    stuff = {"num_stuff_classes": 3} if section.get("source") == "maps" else {}
    return build(seed, kind=kind, semantic_branch=changes, **stuff)


def cells(maps_BHW: Tensor) -> Tensor:
    return torch.stack([maps_BHW[:, 8 * i + 4, 8 * j + 4] for i in range(8) for j in range(8)], -1).view(
        -1, 8, 8
    )


def test_labels(scenes: CocoPanopticDataset) -> None:  # noqa: F811
    """Labels from masks, boxes and maps; ignored pixels are trained only where an object is."""
    batch = load(scenes)
    pixels = batch.targets.semantic_BHW.clone()
    pixels[:, 30:] = IGNORE
    targets = batch.targets._replace(semantic_BHW=pixels)
    maps = branched(source="maps").semantic_branch.labels(targets, (8, 8))
    assert torch.equal(maps, cells(pixels).long().where(cells(pixels) != IGNORE, NO_CLASS))

    labels = {
        source: branched(source=source).semantic_branch.labels(targets, (8, 8))
        for source in ("masks", "boxes")
    }
    ignored = cells(pixels) == IGNORE
    for b in range(2):
        for i in range(8):
            for j in range(8):
                y, x = 8 * i + 4, 8 * j + 4
                inside = [
                    m
                    for m, (x0, y0, x1, y1) in enumerate(targets.boxes_BM4[b].tolist())
                    if targets.valid_BM[b, m] and x0 <= x < x1 and y0 <= y < y1
                ]
                nothing = NO_CLASS if ignored[b, i, j] else 4
                if not inside:
                    assert labels["boxes"][b, i, j] == labels["masks"][b, i, j] == nothing
                assert int(labels["boxes"][b, i, j]) in {*targets.labels_BM[b, inside].tolist(), nothing}
                assert bool(inside) == bool(labels["boxes"][b, i, j] not in (4, NO_CLASS))
    # The map's things come from the same segments as the painted masks, so they are in the same places.
    things = (cells(batch.targets.semantic_BHW) == 0) & ~ignored
    painted = (labels["masks"] >= 0) & (labels["masks"] < 4) & ~ignored
    assert (things == painted).float().mean() > 0.95 and painted.any()
    assert not torch.equal(labels["masks"], labels["boxes"])


def test_loss_is_the_weighted_mean_over_labelled_cells() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 300, 3, 4, requires_grad=True)
    labels = torch.randint(0, 300, (2, 3, 4))
    labels[0, 0, 0], labels[1, 2] = 255, NO_CLASS  # 255 is a class here
    (loss,) = branch_loss(BranchPredictions(logits, labels), 0.2).values()
    terms = [
        -logits[b, :, i, j].log_softmax(0)[labels[b, i, j]]
        for b in range(2)
        for i in range(3)
        for j in range(4)
        if labels[b, i, j] != NO_CLASS
    ]
    torch.testing.assert_close(loss, 0.2 * sum(terms, torch.zeros(())) / len(terms))
    (nothing,) = branch_loss(BranchPredictions(logits, torch.full_like(labels, NO_CLASS)), 0.2).values()
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert nothing == 0 and not gradient.any()


def test_head_equals_htc() -> None:
    """Levels are resized to stride 8, each through its own 1x1 convolution, summed, convolved."""
    torch.manual_seed(0)
    branch = branched(embed=True).semantic_branch
    levels = [torch.randn(2, 16, 64 // s, 64 // s) for s in (4, 8, 16, 32, 64)]
    logits, embedding = branch(levels)
    hidden = torch.zeros(2, 16, 8, 8)
    for level, lateral in zip(levels, branch.laterals, strict=True):
        resized = F.interpolate(level, (8, 8), mode="bilinear", align_corners=False)
        hidden = hidden + F.conv2d(resized, lateral[0].weight, lateral[0].bias).relu()
    for block in branch.convs:
        hidden = F.conv2d(hidden, block[0].weight, block[0].bias, padding=1).relu()
    torch.testing.assert_close(logits, F.conv2d(hidden, branch.classes.weight, branch.classes.bias))
    assert logits.shape == (2, 5, 8, 8)
    mixed = F.conv2d(hidden, branch.embedding[0].weight, branch.embedding[0].bias).relu()
    torch.testing.assert_close(embedding, mixed)


def test_embedding_is_added_by_roi_align() -> None:
    torch.manual_seed(0)
    pool = build().pool
    levels = [torch.randn(2, 16, 64 // s, 64 // s) for s in (4, 8, 16, 32, 64)]
    embedding = torch.randn(2, 16, 8, 8)
    boxes = torch.rand(2, 3, 4).mul(30).cumsum(-1)
    for resolution in (7, 14):
        found = pool(RoiMaps(levels, embedding), boxes, resolution, 2)
        added = torchvision.ops.roi_align(embedding, list(boxes), resolution, 1 / 8, 2, True)
        torch.testing.assert_close(found, pool(RoiMaps(levels), boxes, resolution, 2) + added)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_without_embedding_ignores_the_branch(
    scenes: CocoPanopticDataset,  # noqa: F811
    kind: str,
) -> None:
    batch, plain, model = load(scenes), build(kind=kind).eval(), branched(kind).eval()
    state = plain.state_dict()
    missing = model.load_state_dict(state, strict=False)
    assert all(name.startswith("semantic_branch.") for name in missing.missing_keys)
    assert not missing.unexpected_keys
    runs: list[str] = []
    model.semantic_branch.register_forward_hook(lambda *_: runs.append("branch"))
    with torch.no_grad():
        mine, theirs = model(batch).detections, plain(batch).detections
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)) and not runs
        embedded = branched(kind, embed=True).eval()
        embedded.load_state_dict(state, strict=False)
        other = embedded(batch).detections
    assert not torch.equal(other.scores_BD, theirs.scores_BD)


@pytest.mark.parametrize("source", ["masks", "boxes", "maps"])
@pytest.mark.parametrize("kind", KINDS)
def test_trains(scenes: CocoPanopticDataset, kind: str, source: str) -> None:  # noqa: F811
    """The branch's loss alone reaches the pyramid and the backbone, and is among the losses and counts."""
    model, batch = branched(kind, source=source), load(scenes)
    predictions = model.train()(batch)
    losses = model.losses(predictions, batch)
    losses["loss_sem_seg"].backward()
    for part, reached in (("semantic_branch", True), ("fpn", True), ("backbone", True), ("box_head", False)):
        gradients = [p.grad for p in getattr(model, part).parameters() if p.grad is not None]
        assert bool(gradients) == reached and all(g.isfinite().all() for g in gradients)
    assert list(dict(model.named_children()))[-1] == "semantic_branch"
    assert 0 < model.counts(predictions)["labelled_cells"] <= 64
    wanted = {"masks": {"ignored"}, "boxes": {"ignored"}, "maps": {"semantic"}}[source]
    assert model.targets == {"boxes", "masks"} | wanted
    assert total_loss(losses) > losses["loss_sem_seg"] > 0


def test_targets_without_mask_head() -> None:
    for source, wanted in (("masks", {"boxes", "masks", "ignored"}), ("boxes", {"boxes", "ignored"})):
        changes = {"mask_head": {"enabled": False}, "semantic_branch": {"enabled": True, "source": source}}
        assert build(**changes).targets == wanted


def test_heads_use_the_embedding(scenes: CocoPanopticDataset) -> None:  # noqa: F811
    """The losses of the heads alone train the embedding."""
    model = branched(embed=True, loss_weight=0.0)
    step(model, load(scenes))
    gradient = model.semantic_branch.embedding[0].weight.grad
    assert gradient.isfinite().all() and gradient.any()


def test_numbers_of_stuff_classes(demo_data: Path) -> None:
    """The number is read from the annotations if maps are the source; otherwise it is not set."""

    def resolved(data_of: str, **section: Any) -> Any:
        raw = tiny_run(
            demo_data, demo_data, data_of, giantdet__model__semantic_branch={"enabled": True, **section}
        )
        raw["giantdet"]["model"] = {**raw["giantdet"]["model"], "type": "cascade_mask_rcnn"}
        if section:
            raw["giantdet"]["model"]["num_stuff_classes"] = "auto"
        for key in ("semantic_head", "merge"):
            raw["giantdet"]["model"].pop(key, None)
        run = parse_run(raw)
        dataset = open_dataset(run.giantdet.data.train)
        return resolve(run, 1, len(dataset), dataset.classes, has_gpu=False).giantdet.model, dataset.classes

    model, classes = resolved("panoptic_fpn", source="maps")
    assert model.num_stuff_classes == len(classes.stuff) > 0 and model.predicted(classes) == classes
    model, classes = resolved("panoptic_fpn")
    assert model.num_stuff_classes is None and not model.predicted(classes).semantic
    with pytest.raises(ConfigError, match="cascade_mask_rcnn needs"):
        resolved("mask_rcnn", source="maps")


def test_batch_norms_follow_the_norm_block() -> None:
    section = {"enabled": True, "norm": "batch", "convs": 2}
    config = SECTIONS["mask_rcnn"].model_validate({"semantic_branch": section})
    assert config.batch_norms()["heads"] == (
        "model.box_head or model.mask_head or model.semantic_branch",
        True,
    )
    branch = branched(norm="batch", embed=True).semantic_branch
    kinds = [type(module).__name__ for module in branch.modules() if hasattr(module, "running_mean")]
    assert kinds == ["CrossGpuBatchNorm"] * (5 + 2 + 1)


def test_bad_settings_are_named() -> None:
    def problems(kind: str, **section: Any) -> list[str]:
        return list(SECTIONS[kind].model_validate({"type": kind, **section}).problems())

    (problem,) = problems("panoptic_fpn", semantic_branch={"enabled": True})
    assert problem.startswith("semantic_branch.enabled must be false")
    (problem,) = problems("mask_rcnn", num_stuff_classes=3)
    assert problem.startswith("num_stuff_classes is for semantic_branch.source maps")
    (problem,) = problems("mask_rcnn", semantic_branch={"enabled": True, "source": "maps"})
    assert problem.startswith("num_stuff_classes must be")
    section = {"enabled": True, "norm": "group", "width": 48}
    assert [p.split()[0] for p in problems("mask_rcnn", semantic_branch=section)] == ["semantic_branch.width"]
    assert not problems("panoptic_fpn", num_stuff_classes=3)
