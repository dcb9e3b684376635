"""Sampling of RoIs against mmdetection's rule for the best proposals, written as loops."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from giantdet.config.architectures.common import BoxHeadConfig
from giantdet.layers.box_head import candidate_rois, random_rois
from giantdet.layers.rpn import Proposals
from giantdet.structures import Targets

IMAGES, OBJECTS, PROPOSALS, IOU = 3, 4, 40, 0.5


def crowd(seed: int = 0) -> tuple[Proposals, Targets]:
    """Overlapping objects with proposals around them; the last image has one object less."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(IMAGES, OBJECTS, 2, generator=generator) * 12
    boxes_BM4 = torch.cat([corner, corner + 60], -1)
    around = boxes_BM4.repeat(1, PROPOSALS // OBJECTS, 1)
    boxes_BN4 = around + torch.randn(around.shape, generator=generator) * 6
    valid_BM = torch.ones(IMAGES, OBJECTS, dtype=torch.bool)
    valid_BM[-1, -1] = False
    valid_BN = torch.rand(IMAGES, PROPOSALS, generator=generator) > 0.2
    labels_BM = torch.arange(OBJECTS).expand(IMAGES, -1)
    nothing = torch.zeros(IMAGES, OBJECTS, 0, 0, dtype=torch.uint8)
    return (
        Proposals(boxes_BN4.where(valid_BN[..., None], 0.0), torch.zeros(IMAGES, PROPOSALS), valid_BN),
        Targets(boxes_BM4.where(valid_BM[..., None], 0.0), labels_BM, valid_BM, nothing, boxes_BM4),
    )


def object_of(boxes_N4: Tensor, objects_M4: Tensor, best_takes_object: bool) -> list[int]:
    """Return the object that each proposal of one image predicts, -1 for background."""
    iou = box_iou(objects_M4, boxes_N4).tolist()
    found = []
    for n in range(len(boxes_N4)):
        column = [row[n] for row in iou]
        found.append(column.index(max(column)) if max(column) >= IOU else -1)
    for m in range(len(objects_M4) if best_takes_object else 0):
        if max(iou[m]) >= IOU:
            found[iou[m].index(max(iou[m]))] = m
    return found


def test_best_proposals_take_their_object() -> None:
    proposals, targets = crowd()
    config = BoxHeadConfig(batch_per_image=100, positive_fraction=1.0)
    answers = []
    for best in (False, True):
        candidates = candidate_rois(proposals, targets, IOU, OBJECTS, best)
        rois = random_rois(candidates, config, OBJECTS, torch.arange(IMAGES))
        answers.append([])
        for b in range(IMAGES):
            boxes_N4 = proposals.boxes_BN4[b][proposals.valid_BN[b]]
            objects_M4 = targets.boxes_BM4[b][targets.valid_BM[b]]
            wanted = object_of(boxes_N4, objects_M4, best) + list(range(len(objects_M4)))
            valid_R = rois.valid_BR[b]
            where_N = torch.cdist(torch.cat([boxes_N4, objects_M4]), rois.boxes_BR4[b][valid_R]).argmin(1)
            index_R = rois.index_BR[b].where(rois.positive_BR[b], -1)[valid_R]
            assert int(valid_R.sum()) == len(wanted) and len(where_N.unique()) == len(wanted)
            assert index_R[where_N].tolist() == wanted
            answers[-1].append(wanted)
    assert answers[0] != answers[1]
