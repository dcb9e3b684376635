"""Maps painted from objects against a loop that paints cell by cell, and pycocotools' whole-image masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.demo import make_demo
from giantdet.data.loader import train_loader
from giantdet.ops.label_maps import cell_centres, paint_objects

B, M, S, STRIDE, GRID, BACKGROUND = 2, 6, 10, 8, (7, 9), 40


def scene(seed: int) -> tuple[Tensor, ...]:
    """Objects of all sizes, some without a mask, in slots of which some are empty."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    corner_BM2 = rand(B, M, 2) * 40
    boxes_BM4 = torch.cat([corner_BM2, corner_BM2 + 6 + rand(B, M, 2) * 40], -1)
    masks_BMSS = (rand(B, M, S, S) * 256).to(torch.uint8)
    has_mask_BM1 = rand(B, M, 1) > 0.4
    margin = torch.tensor([-3.0, -2.0, 4.0, 1.0])
    frames_BM4 = (boxes_BM4 + margin).where(has_mask_BM1, 0.0)
    return boxes_BM4, torch.arange(B * M).reshape(B, M), rand(B, M) > 0.2, masks_BMSS, frames_BM4


def by_hand(
    boxes_BM4: Tensor, labels_BM: Tensor, valid_BM: Tensor, masks_BMSS: Tensor, frames_BM4: Tensor
) -> Tensor:
    """Paint the largest object first, cell by cell."""
    found = torch.full((B, *GRID), BACKGROUND)
    for b in range(B):
        areas = [float((x1 - x0) * (y1 - y0)) for x0, y0, x1, y1 in boxes_BM4[b].tolist()]
        for m in sorted(range(M), key=lambda m: -areas[m]):
            if not valid_BM[b, m]:
                continue
            for i in range(GRID[0]):
                for j in range(GRID[1]):
                    y, x = i * STRIDE + STRIDE / 2, j * STRIDE + STRIDE / 2
                    x0, y0, x1, y1 = frames_BM4[b, m].tolist()
                    if x1 > x0 and len(masks_BMSS[b, m]):
                        row, column = (y - y0) / (y1 - y0) * S // 1, (x - x0) / (x1 - x0) * S // 1
                        inside = 0 <= row < S and 0 <= column < S
                        covered = inside and masks_BMSS[b, m, int(row), int(column)] >= 128
                    else:
                        x0, y0, x1, y1 = boxes_BM4[b, m].tolist()
                        covered = x0 <= x < x1 and y0 <= y < y1
                    if covered:
                        found[b, i, j] = labels_BM[b, m]
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("boxes_alone", [False, True])
def test_equals_painting_the_largest_first(seed: int, boxes_alone: bool) -> None:
    boxes, labels, valid, masks, frames = scene(seed)
    if boxes_alone:
        masks = masks[..., :0, :0]
    painted = paint_objects(boxes, labels, valid, masks, frames, GRID, STRIDE, BACKGROUND)
    assert torch.equal(painted, by_hand(boxes, labels, valid, masks, frames))
    assert len(painted.unique()) > 4


def test_cells_without_objects_are_background() -> None:
    boxes, labels, valid, masks, frames = scene(0)
    none = torch.zeros_like(valid)
    painted = paint_objects(boxes, labels, none, masks, frames, GRID, STRIDE, BACKGROUND)
    assert (painted == BACKGROUND).all()


def test_equals_the_masks_of_whole_images(tmp_path: Path) -> None:
    """At scale 1 a cell of a frame is a pixel, so only the painting order could differ."""
    make_demo(tmp_path, train_images=6, val_images=1, size=64)
    dataset = CocoDataset(tmp_path / "train.json", tmp_path / "train")
    config = DataConfig(
        size=(64, 64), short_side=64, max_objects=20, mask_frame=66, workers=0, augment={"flip": 0.0}
    )
    batch = next(train_loader(dataset, config, 6, seed=1))
    targets = batch.targets
    painted = paint_objects(
        targets.boxes_BM4,
        targets.labels_BM,
        targets.valid_BM,
        targets.masks_BMSS,
        targets.frames_BM4,
        (8, 8),
        8,
        BACKGROUND,
    )
    for b, image_id in enumerate(batch.image_ids_B.tolist()):
        objects = dataset.objects(dataset.image_ids.tolist().index(image_id))
        areas = (objects.boxes_N4[:, 2:] - objects.boxes_N4[:, :2]).prod(1)
        whole = torch.full((1, 64, 64), BACKGROUND)
        for n in (-areas).argsort(kind="stable"):
            whole[0][torch.from_numpy(objects.masks()[n])] = int(objects.labels_N[n])
        assert torch.equal(cell_centres(whole, 8)[0], painted[b])
    assert (painted != BACKGROUND).float().mean() > 0.1
