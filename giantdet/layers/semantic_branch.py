"""A semantic branch beside the heads of two-stage detectors: a second supervision of the pyramid.

Shapes: B images · C classes of pixels · h, w the map of stride 8.
Source: the fused semantic head of HTC (Chen et al. 2019, "Hybrid Task Cascade", section 3.3; mmdetection's
`FusedSemanticHead`). Differences: levels are resized with pixel centres aligned, not corners, so that all
levels stay in place; the embedding is read by RoIAlign at the RoI's own resolution; and the classifier begins
with small weights, because with few classes HTC's would begin with a large loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantdet.config.architectures.mask_rcnn import TwoStageConfig
from giantdet.layers.common import ConvBlock, normal_
from giantdet.layers.roi_pool import EMBEDDING_STRIDE, RoiMaps
from giantdet.ops.label_maps import cell_centres, paint_objects
from giantdet.structures import IGNORE, Targets

NO_CLASS = -1
"""Label of cells that are not trained. `IGNORE` is a class where a data set has more than 255."""


class BranchPredictions(NamedTuple):
    """Logits at stride 8, and the class that each cell should have."""

    logits_BChw: Tensor  # float32
    labels_Bhw: Tensor  # int64, in [0, C) or NO_CLASS


class SemanticBranch(nn.Module):
    """Levels P2 to P6 to class logits `[B, C, h, w]`, float32, and an embedding `[B, channels, h, w]`.

    The levels, at `strides`, are resized to the one of stride 8.
    With labels made of objects, the classes are those of the objects and then background. With the data set's
    maps, class 0 stands for all objects, and the others are stuff.
    """

    def __init__(self, config: TwoStageConfig, num_classes: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.fused = strides.index(EMBEDDING_STRIDE)
        section, channels = config.semantic_branch, config.fpn.channels
        self.source, self.background = section.source, num_classes
        count = config.num_stuff_classes if section.source == "maps" else num_classes
        assert isinstance(count, int)  # "auto" is resolved
        outputs = 1 + count

        def block(inputs: int, outputs: int, kernel: int) -> ConvBlock:
            return ConvBlock(inputs, outputs, kernel, section.norm, relu=True, init="msra")

        self.laterals = nn.ModuleList(block(channels, channels, 1) for _ in strides)
        inputs = [channels, *[section.width] * section.convs]
        self.convs = nn.Sequential(*(block(count, section.width, 3) for count in inputs[:-1]))
        self.classes = nn.Conv2d(inputs[-1], outputs, 1)
        normal_(self.classes, std=0.01)
        self.embedding = block(inputs[-1], channels, 1) if section.embed else None

    @property
    def targets(self) -> frozenset[str]:
        """The targets that labels are made of, in addition to boxes; see `Architecture.targets`."""
        return frozenset({"maps": {"semantic"}, "masks": {"masks", "ignored"}}.get(self.source, {"ignored"}))

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        size = levels[self.fused].shape[-2:]
        fused = self.laterals[self.fused](levels[self.fused])
        for i, level in enumerate(levels):
            if i != self.fused:
                resized = F.interpolate(level, size=size, mode="bilinear", align_corners=False)
                fused = fused + self.laterals[i](resized)
        hidden = self.convs(fused)
        embedding = self.embedding(hidden) if self.embedding is not None else None
        return self.classes(hidden).float(), embedding

    def labels(self, targets: Targets, grid_hw: tuple[int, int]) -> Tensor:
        """Return the class of each cell, int64 `[B, h, w]` with `NO_CLASS`."""
        pixels_Bhw = cell_centres(targets.semantic_BHW, EMBEDDING_STRIDE)
        ignored_Bhw = pixels_Bhw == IGNORE
        if self.source == "maps":
            return torch.where(ignored_Bhw, NO_CLASS, pixels_Bhw.to(torch.int64))
        masks_BMSS = targets.masks_BMSS if self.source == "masks" else targets.masks_BMSS[..., :0, :0]
        painted_Bhw = paint_objects(
            targets.boxes_BM4,
            targets.labels_BM,
            targets.valid_BM,
            masks_BMSS,
            targets.frames_BM4,
            grid_hw,
            EMBEDDING_STRIDE,
            self.background,
        )
        return torch.where(ignored_Bhw & (painted_Bhw == self.background), NO_CLASS, painted_Bhw)


def branch_predictions(
    branch: SemanticBranch | None, levels: list[Tensor], targets: Targets
) -> tuple[RoiMaps, BranchPredictions | None]:
    """Return the maps that RoIs are read from in training, and the predictions of the branch, if any."""
    if branch is None:
        return RoiMaps(levels), None
    logits_BChw, embedding_BChw = branch(levels)
    height, width = logits_BChw.shape[-2:]
    labels_Bhw = branch.labels(targets, (height, width))
    return RoiMaps(levels, embedding_BChw), BranchPredictions(logits_BChw, labels_Bhw)


def roi_maps(branch: SemanticBranch | None, levels: list[Tensor]) -> RoiMaps:
    """Return the maps that RoIs are read from in evaluation; without an embedding the branch is not run."""
    if branch is None or branch.embedding is None:
        return RoiMaps(levels)
    return RoiMaps(levels, branch(levels)[1])


def branch_loss(p: BranchPredictions, weight: float) -> dict[str, Tensor]:
    """Return `loss_sem_seg`: the mean cross-entropy of the cells that have a class, times `weight`."""
    labelled_Bhw = p.labels_Bhw != NO_CLASS
    entropy_Bhw = F.cross_entropy(p.logits_BChw, p.labels_Bhw, ignore_index=NO_CLASS, reduction="none")
    total = torch.where(labelled_Bhw, entropy_Bhw, 0.0).sum()
    return {"loss_sem_seg": weight * total / labelled_Bhw.sum().clamp_min(1)}
