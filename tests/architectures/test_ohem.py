"""OHEM against sorting all candidates by hand: which RoIs, their losses and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_detector import build, emptied, load, scenes, step  # noqa: F401
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from giantdet.config.architectures import SECTIONS
from giantdet.data.coco_panoptic import CocoPanopticDataset
from giantdet.layers.box_head import match_rois, row_images
from giantdet.layers.roi_pool import RoiMaps
from giantdet.ops import shapes
from giantdet.structures import Batch, Targets

R, FRACTION, CLASSES = 6, 0.5, 4
"""RoIs per image; few, so that the choice matters."""


def ohem(kind: str = "mask_rcnn", over: str = "batch", **box_head: Any) -> Any:
    sampling = {"type": "ohem", "over": over}
    changes = {"batch_per_image": R, "positive_fraction": FRACTION, "sampling": sampling, **box_head}
    return build(kind=kind, box_head=changes)


def candidates_by_hand(model: Any, batch: Batch) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return both losses `[K, 2]` of all candidates of a batch, with a graph, and what each candidate is."""
    levels = model.pyramid(batch)
    proposals, _ = model.rpn(levels, batch.sizes_B2, batch.targets, batch.seeds_B)
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    losses, what = [], []
    boxes_BN4 = torch.cat([proposals.boxes_BN4, batch.targets.boxes_BM4], 1)
    logits, deltas = model.box_head(model.pool(RoiMaps(levels), boxes_BN4, 7, 2))
    logits, deltas = logits.view(*boxes_BN4.shape[:2], -1), deltas.view(*boxes_BN4.shape[:2], -1, 4)
    for b in range(len(boxes_BN4)):
        valid_N = torch.cat([proposals.valid_BN[b], batch.targets.valid_BM[b]])
        objects_G4 = batch.targets.boxes_BM4[b][batch.targets.valid_BM[b]]
        for n in valid_N.nonzero().flatten().tolist():
            box_14, label, distance = boxes_BN4[b, n][None], CLASSES, torch.zeros(())
            iou_G = box_iou(objects_G4, box_14)[:, 0]
            if len(iou_G) and iou_G.max() >= 0.5:
                g = int(iou_G.argmax())
                label = int(batch.targets.labels_BM[b, g])
                goal = coder.encode_single(objects_G4[g][None], box_14)
                distance = (deltas[b, n, label] - goal[0]).abs().sum()
            entropy = F.cross_entropy(logits[b, n][None], torch.tensor([label]))
            losses.append(torch.stack([entropy, distance]))
            what.append({"image": b, "box": box_14[0].tolist(), "label": label})
    return torch.stack(losses), what


def select_by_hand(losses_K2: Tensor, what: list[dict[str, Any]], over: str, images: int) -> list[int]:
    """Select as Megvii (largest sums) or mmdetection (largest entropies, positives within their quota)."""
    losses = losses_K2.detach().numpy()
    if over == "batch":
        return sorted(range(len(what)), key=lambda k: -losses[k].sum())[: images * R]
    chosen = []
    for b in range(images):
        mine = [k for k in range(len(what)) if what[k]["image"] == b]
        mine.sort(key=lambda k: -losses[k, 0])
        positives = [k for k in mine if what[k]["label"] < CLASSES][: int(R * FRACTION)]
        negatives = [k for k in mine if what[k]["label"] == CLASSES][: R - len(positives)]
        chosen += positives + negatives
    return chosen


@pytest.mark.parametrize("gone", [(), (1,), (0, 1)])
@pytest.mark.parametrize("over", ["batch", "image"])
def test_equals_sorting_by_hand(scenes: CocoPanopticDataset, over: str, gone: tuple[int, ...]) -> None:  # noqa: F811
    """RoIs, both losses, and gradients equal those of summing the selected losses among all candidates."""
    model, batch = ohem(over=over), emptied(load(scenes), *gone)
    with torch.no_grad():  # separates the losses: the order of near ties would be rounding noise
        for layer in (model.box_head.classes, model.box_head.deltas):
            layer.weight.mul_(100)
    losses_K2, what = candidates_by_hand(model.train(), batch)
    chosen = select_by_hand(losses_K2, what, over, 2)
    assert len(chosen) < len(what)
    expected = losses_K2[chosen].sum(0) / len(chosen)
    names = ("classes.weight", "deltas.weight", "fcs.0.weight")
    parameters = [model.box_head.get_parameter(name) for name in names]
    gradients = torch.autograd.grad(expected.sum(), parameters, allow_unused=True)

    model.mask_head = None
    predictions = model(batch)
    losses = model.losses(predictions, batch)
    torch.testing.assert_close(torch.stack([losses["loss_cls"], losses["loss_box_reg"]]), expected)
    found = torch.autograd.grad(losses["loss_cls"] + losses["loss_box_reg"], parameters)
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)

    box = predictions.box
    assert box.valid_BR.all() and box.valid_BR.shape == (2, R)
    assert sorted(box.labels_BR.flatten().tolist()) == sorted(what[k]["label"] for k in chosen)
    counts = [sum(what[k]["image"] == b for k in chosen) for b in range(2)]
    assert over == "image" or gone != (1,) or counts[0] != R, "no image has more than its share"
    # Positives begin each row, in equal shares over the batch: they are in the first slots of the mask head.
    positive_BR = box.positive_BR.int()
    assert (positive_BR.diff(dim=1) <= 0).all()
    assert over == "image" or int(positive_BR.sum(1).max() - positive_BR.sum(1).min()) <= 1


def test_masks_come_from_the_rois_own_images(scenes: CocoPanopticDataset) -> None:  # noqa: F811
    """With all candidates selected, each image's mask loss is that of the image alone."""
    model, batch = ohem(batch_per_image=28), load(scenes)
    model.config = model.config.model_copy(
        update={"mask_head": model.config.mask_head.model_copy(update={"slots": 28})}
    )
    model.mask_head.config = model.config.mask_head
    model.eval()  # running statistics, so that an image does not depend on the other
    levels = model.pyramid(batch)

    def masks_of(given: Batch, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        found = model.predict_objects(maps, given).mask
        return tuple(field[found.valid_BP] for field in (found.logits_BPSS, found.targets_BPSS))

    together = masks_of(batch, levels)
    parts = []
    for b in range(2):
        one = slice(b, b + 1)
        targets = type(batch.targets)._make(field[one] for field in batch.targets)
        given = batch._replace(targets=targets, sizes_B2=batch.sizes_B2[one], seeds_B=batch.seeds_B[one])
        parts.append(masks_of(given, [level[one] for level in levels]))
    alone = [torch.cat(fields) for fields in zip(*parts, strict=True)]
    assert len(together[0]) == len(alone[0]) > 5
    for mine, theirs in zip(together, alone, strict=True):
        order = [x.flatten(1).double().sum(1).argsort() for x in (mine, theirs)]
        torch.testing.assert_close(mine[order[0]], theirs[order[1]])


@pytest.mark.parametrize(
    ("kind", "over"), [("mask_rcnn", "batch"), ("mask_rcnn", "image"), ("cascade_mask_rcnn", "batch")]
)
def test_slots_with_a_graph_are_as_many_as_without_ohem(
    scenes: CocoPanopticDataset,  # noqa: F811
    kind: str,
    over: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shapes, "ENABLED", False)  # as on a GPU

    def rows(model: Any) -> list[int]:
        found: list[int] = []
        for module in model.modules():
            if type(module).__name__ in ("BoxHead", "MaskHead"):
                module.register_forward_hook(
                    lambda _, inputs, __: found.append(len(inputs[0])) if torch.is_grad_enabled() else None
                )
        step(model, load(scenes))
        return found

    random = build(kind=kind, box_head={"batch_per_image": R})
    assert rows(ohem(kind, over)) == rows(random)


def test_running_statistics_come_from_the_selected_rois(scenes: CocoPanopticDataset) -> None:  # noqa: F811
    model, batch = ohem(convs=1, norm="batch"), load(scenes)
    (norm,) = [module for module in model.box_head.modules() if hasattr(module, "running_mean")]
    means: list[Tensor] = []

    def note(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            means.append(inputs[0].mean((0, 2, 3)).detach())

    norm.register_forward_hook(note)
    step(model, batch)
    torch.testing.assert_close(norm.running_mean, 0.1 * means[0])
    assert len(means) == 1 and int(norm.num_batches_tracked) == 1


def test_later_stages_match_objects_of_the_rois_own_images() -> None:
    """Each row has RoIs of both images; compared with loops over them."""
    generator = torch.Generator().manual_seed(0)
    corner_B62 = torch.rand(2, 6, 2, generator=generator) * 30
    boxes_B64 = torch.cat([corner_B62, corner_B62 + 40], -1)
    image_B6 = torch.tensor([[0, 1, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0]])
    objects_BM4 = boxes_B64.flip(0)[:, :3] + 2
    valid_BM = torch.tensor([[True, True, True], [True, False, True]])
    batch_targets = load_targets(objects_BM4, valid_BM)
    found = match_rois(boxes_B64, torch.ones(2, 6, dtype=torch.bool), image_B6, batch_targets, 0.6, 9)
    for row in range(2):
        for slot in range(6):
            b = int(image_B6[row, slot])
            iou_M = box_iou(objects_BM4[b], boxes_B64[row, slot][None])[:, 0].where(valid_BM[b], -1.0)
            best = int(iou_M.argmax())
            assert int(found.index_BR[row, slot]) == best
            assert bool(found.positive_BR[row, slot]) == bool(iou_M[best] >= 0.6)
            assert int(found.labels_BR[row, slot]) == (3 * b + best if iou_M[best] >= 0.6 else 9)
    same = match_rois(boxes_B64, valid_BM[:, :1].expand(2, 6), row_images(image_B6), batch_targets, 0.6, 9)
    assert not torch.equal(same.index_BR, found.index_BR)
    assert 0 < int(found.positive_BR.sum()) < 12


def load_targets(boxes_BM4: Tensor, valid_BM: Tensor) -> Any:
    labels_BM = torch.arange(valid_BM.numel()).reshape(valid_BM.shape)
    return Targets(boxes_BM4, labels_BM, valid_BM, torch.zeros(2, 3, 0, 0, dtype=torch.uint8), boxes_BM4)


@pytest.mark.parametrize("changes", [{"conventions": "detectron2"}, {"conventions": "mmdetection"}])
def test_cascade_trains(scenes: CocoPanopticDataset, changes: dict[str, Any]) -> None:  # noqa: F811
    over = "image" if changes["conventions"] == "mmdetection" else "batch"
    box_head = {"batch_per_image": R, "sampling": {"type": "ohem", "over": over}}
    model = build(kind="cascade_mask_rcnn", box_head=box_head, **changes)
    for gone in ((), (0, 1)):
        losses = step(model, emptied(load(scenes), *gone))
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.box_head.parameters())


def test_settings_without_effect_are_refused() -> None:
    def problems(kind: str, **section: Any) -> list[str]:
        return list(SECTIONS[kind].model_validate({"type": kind, **section}).problems())

    (problem,) = problems("mask_rcnn", box_head={"sampling": {"over": "image"}})
    assert problem.startswith("box_head.sampling.over is for")
    hard = {"sampling": {"type": "ohem"}}
    (problem,) = problems("cascade_mask_rcnn", conventions="mmdetection", box_head=hard)
    assert problem.startswith('box_head.sampling.over must be "image"')
    assert not problems("cascade_mask_rcnn", box_head=hard)
