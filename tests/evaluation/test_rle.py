"""RLE from windows, against pycocotools on bitmaps of the whole image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util
from tiny import launch_ok

from giantdet.data.segments import rle_counts
from giantdet.evaluation import rle
from giantdet.ops.masks import paste_masks

HEIGHT, WIDTH = 37, 53


def coco(mask: np.ndarray) -> dict[str, Any]:
    found = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode("ascii")}


def boxes() -> torch.Tensor:
    """Boxes at and beyond every border, of one pixel, of no extent, of the whole image, and random ones."""
    corners = [
        [0.0, 0, WIDTH, HEIGHT],
        [0, 0, 1, 1],
        [WIDTH - 1, HEIGHT - 1, WIDTH, HEIGHT],
        [10, 10, 11, 11],
        [10.2, 10.3, 10.6, 10.8],
        [5, 5, 5, 9],
        [7, 7, 3, 3],
        [0, 5, 9, 20],
        [WIDTH - 9, 5, WIDTH, 20],
        [20, 0, 30, HEIGHT],
        [0, 20, WIDTH, 30],
        [-4, -3, 9, 8],
        [WIDTH + 1, 3, WIDTH + 9, 8],
        [-9, -9, -2, -2],
    ]
    points = torch.rand(60, 2, 2, generator=torch.Generator().manual_seed(0)) * (WIDTH + 8) - 4
    random = torch.cat([points.amin(1), points.amax(1)], 1)
    return torch.cat([torch.tensor(corners), random])


@pytest.mark.parametrize("at_pixel_centres", [True, False], ids=["detectron2", "torchvision"])
@pytest.mark.parametrize("strip", [1, 100, 1 << 21])
@pytest.mark.parametrize("kind", ["random", "full", "half", "empty", "smooth"])
def test_pasted_masks_equal_the_bitmap_of_the_image(
    kind: str, strip: int, at_pixel_centres: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`half` is 0.5 everywhere: whether a pixel counts depends on the last bit."""
    monkeypatch.setattr(rle, "_PASTED_PIXELS", strip)
    boxes_D4 = boxes()
    generator = torch.Generator().manual_seed(1)
    masks_DSS = {
        "random": torch.rand(len(boxes_D4), 28, 28, generator=generator),
        "full": torch.ones(len(boxes_D4), 28, 28),
        "half": torch.full((len(boxes_D4), 28, 28), 0.5),
        "empty": torch.zeros(len(boxes_D4), 28, 28),
        "smooth": torch.rand(len(boxes_D4), 1, 28, generator=generator).expand(-1, 28, 28),
    }[kind]
    whole = paste_masks(masks_DSS, boxes_D4, HEIGHT, WIDTH, at_pixel_centres=at_pixel_centres).numpy()
    encoded = rle.encode_pasted(masks_DSS, boxes_D4, (HEIGHT, WIDTH), at_pixel_centres)
    for found, box_4, mask_HW in zip(encoded, boxes_D4, whole, strict=True):
        assert found == coco(mask_HW), box_4
        assert (rle.decode_mask(found).numpy() == mask_HW).all()
    assert whole.any() == (kind != "empty") or (kind, at_pixel_centres) == ("half", False)


def test_a_box_that_is_not_finite_has_no_mask() -> None:
    for value in (float("nan"), float("inf")):
        boxes_14 = torch.tensor([[0, 0, 5, value]])
        (found,) = rle.encode_pasted(torch.ones(1, 4, 4), boxes_14, (20, 30), True)
        assert found == coco(np.zeros((20, 30), bool))


@pytest.mark.parametrize("at_pixel_centres", [True, False], ids=["detectron2", "torchvision"])
def test_a_huge_image_has_the_mask_of_a_small_one(at_pixel_centres: bool) -> None:
    """3.6 billion pixels, whose numbers exceed 32 bits: the same object in a corner, and in the middle.

    Coordinates are multiples of 1/4, which float32 holds at both places.
    """
    height, width, side = 60_000, 60_000, 80
    masks_DSS = torch.rand(2, 28, 28, generator=torch.Generator().manual_seed(2))
    boxes_D4 = torch.tensor([[3.25, 5.5, 61.0, 70.75], [10.0, 10.0, 42.5, 74.25]])
    small = rle.encode_pasted(masks_DSS, boxes_D4, (side, side), at_pixel_centres)
    for x, y in ((0, 0), (31_000, 12_345), (width - side, height - side)):
        moved_D4 = boxes_D4 + torch.tensor([x, y, x, y])
        huge = rle.encode_pasted(masks_DSS, moved_D4, (height, width), at_pixel_centres)
        for here, there in zip(small, huge, strict=True):
            assert there["size"] == [height, width]
            # Starts and ends of the runs, moved: no run touches another column here or there.
            counts = rle_counts(here["counts"].encode())
            turns = np.cumsum(np.array(counts, np.int64))[:-1]
            expected = (turns // side + x) * height + turns % side + y
            found = np.cumsum(np.array(rle_counts(there["counts"].encode()), np.int64))
            assert found[-1] == height * width
            assert (found[:-1] == expected).all()
            assert len(expected) > 100


def test_memory_does_not_grow_with_the_masks(tiny_export: Path) -> None:
    """Tiles need the image and little more; the whole image is also copied to be scaled, 4 bytes a pixel."""
    script = Path(__file__).parents[1] / "engine/memory_of_masks.py"
    (ended,) = launch_ok(script, 1, tiny_export, fresh=True)
    before, in_tiles, whole = map(int, ended.out.split())
    image = 3 * 12_000**2 / 1e6
    assert in_tiles - before < image + 200, (before, in_tiles)
    assert whole - before < image * 7 / 3 + 200, (before, whole)
