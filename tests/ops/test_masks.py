"""Mask targets and pasting against detectron2's golden outputs and torchvision, on full bitmaps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pasting import paste_masks
from torch import Tensor
from torch.testing import assert_close
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

from giantdet.ops.masks import mask_targets


def cut_frames(masks: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Cut 1-pixel cells with a margin of one: `(bitmaps [M, side, side] uint8, frames [M, 4])`.

    Outside the image the margin repeats its edge, as RoIAlign does on a full bitmap.
    """
    padded = F.pad(masks[None].float(), (1, 1, 1, 1), mode="replicate")[0]
    padded = F.pad(padded, (0, side, 0, side))
    bitmaps, frames = [], []
    for mask, full in zip(masks, padded, strict=True):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        y, x = int(rows[0]) - 1, int(columns[0]) - 1
        assert rows[-1] - y + 1 < side and columns[-1] - x + 1 < side
        bitmaps.append(full[y + 1 : y + 1 + side, x + 1 : x + 1 + side])
        frames.append([x, y, x + side, y + side])
    return (torch.stack(bitmaps) * 255).to(torch.uint8), torch.tensor(frames, dtype=torch.float32)


def test_targets_from_full_bitmaps_equal_detectron2(golden):
    masks = golden["gt_masks"].to(torch.uint8) * 255
    frames = torch.tensor([0.0, 0, 256, 256]).expand(1, 10, 4)
    index, boxes = golden["mask_prop_gt"][None], golden["mask_props"][None]
    targets = mask_targets(masks[None], frames, index, boxes, 28, aligned=True, binarize=True)
    assert targets.dtype == torch.float32
    assert (targets[0] == 1).equal(golden["d2.mask_target28"])


def test_targets_from_frames_equal_detectron2(golden):
    masks, frames = cut_frames(golden["gt_masks"], 144)
    index, boxes = golden["mask_prop_gt"][None], golden["mask_props"][None]
    soft = mask_targets(masks[None], frames[None], index, boxes, 28, aligned=True, binarize=False)[0]
    # In the frame's coordinates a mean of points may round to the other side of 0.5.
    wrong = (soft >= 0.5) != golden["d2.mask_target28"]
    assert (soft[wrong] - 0.5).abs().max() < 1e-5 if wrong.any() else True
    assert wrong.float().mean() < 1e-3
    hard = mask_targets(masks[None], frames[None], index, boxes, 28, aligned=True, binarize=True)[0]
    assert hard.equal((soft >= 0.5).float())


def test_soft_targets_equal_torchvision_in_a_batch(golden):
    full = golden["gt_masks"]
    masks, frames = cut_frames(full, 144)
    index, boxes = golden["mask_prop_gt"], golden["mask_props"]
    # The second image has the same objects in reverse order, and one empty slot more.
    empty = torch.zeros(1, 144, 144, dtype=torch.uint8), torch.zeros(1, 4)
    masks_BMSS = torch.stack([torch.cat([masks, empty[0]]), torch.cat([masks.flip(0), empty[0]])])
    frames_BM4 = torch.stack([torch.cat([frames, empty[1]]), torch.cat([frames.flip(0), empty[1]])])
    index_BP, boxes_BP4 = torch.stack([index, 9 - index]), torch.stack([boxes, boxes])
    targets = mask_targets(masks_BMSS, frames_BM4, index_BP, boxes_BP4, 28, aligned=False, binarize=False)
    expected = project_masks_on_boxes(full, boxes, index, 28)
    assert_close(targets, torch.stack([expected, expected]), rtol=0, atol=1e-4)
    nothing = mask_targets(masks_BMSS, frames_BM4, torch.full((2, 3), 10), boxes_BP4[:, :3], 28, True, True)
    assert (nothing == 0).all()


def test_larger_cells_and_degenerate_proposals():
    """A rectangle in cells of 2.5 x 5 pixels; interpolation rounds its corners, so those are excluded."""
    masks = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    masks[0, 0, 4:12, 4:12] = 255
    frames = torch.tensor([[[100.0, 50, 140, 130]]])  # covered: x from 110 to 130, y from 70 to 110
    boxes = torch.tensor(
        [[[110.0, 70, 130, 110], [90, 70, 130, 110], [110, 70, 110, 70], [130, 70, 110, 60]]]
    )
    targets = mask_targets(masks, frames, torch.zeros(1, 4, dtype=torch.int64), boxes, 28, True, True)[0]
    assert (targets[0, 1:-1, 1:-1] == 1).all()
    assert (targets[1, 1:-1, 14:] == 1).all() and (targets[1, :, :14] == 0).all()
    assert targets.isfinite().all()


def test_targets_compile(golden):
    masks, frames = cut_frames(golden["gt_masks"], 144)
    arguments = (masks[None], frames[None], golden["mask_prop_gt"][None], golden["mask_props"][None], 28)
    compiled = torch.compile(mask_targets, fullgraph=True, backend="aot_eager")
    assert compiled(*arguments, True, True).equal(mask_targets(*arguments, True, True))


def test_paste_equals_detectron2(golden):
    pasted = paste_masks(golden["paste_prob28"], golden["paste_boxes"], 256, 256)
    assert pasted.equal(golden["d2.paste"])


def test_paste_equals_grid_sample(random_boxes):
    """Boxes in and beyond an image of 90 x 130, against the grid of points that detectron2 builds."""
    boxes = random_boxes(20, extent=130.0) - 15
    masks = torch.rand(20, 28, 28, generator=torch.Generator().manual_seed(6))
    y, x = torch.arange(90) + 0.5, torch.arange(130) + 0.5
    y = (y - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    x = (x - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    grid = torch.stack([x[:, None].expand(20, 90, 130), y[:, :, None].expand(20, 90, 130)], dim=-1)
    soft = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
    pasted = paste_masks(masks, boxes, 90, 130)
    wrong = pasted != (soft >= 0.5)
    assert (soft[wrong] - 0.5).abs().lt(1e-4).all() and wrong.sum() < 20
    assert 0.01 < pasted.float().mean() < 0.5


def test_paste_equals_torchvision(random_boxes):
    boxes = random_boxes(7, extent=90.0)
    masks = torch.rand(7, 28, 28, generator=torch.Generator().manual_seed(7))
    boxes[5], boxes[6] = torch.tensor([-9.0, -8, 12, 30]), torch.tensor([120.0, 60, 170, 170])
    expected = paste_masks_in_image(masks[:, None], boxes, (100, 140))[:, 0] > 0.5
    # torchvision fails on a box outside the image; giantdet skips it.
    boxes[0] = torch.tensor([150.0, 0, 180, 40])
    expected[0] = False
    assert paste_masks(masks, boxes, 100, 140, at_pixel_centres=False).equal(expected)


@pytest.mark.parametrize("convention", ["detectron2", "torchvision"])
def test_paste_of_nothing_and_of_degenerate_boxes(convention):
    at_centres = convention == "detectron2"
    nothing = paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 30, 40, at_pixel_centres=at_centres)
    assert nothing.shape == (0, 30, 40)
    boxes = torch.tensor([[5.0, 5, 5, 9], [7, 7, 3, 3]])
    pasted = paste_masks(torch.ones(2, 28, 28), boxes, 30, 40, at_pixel_centres=at_centres)
    assert pasted.shape == (2, 30, 40)
    if convention == "detectron2":
        assert not pasted.any()
