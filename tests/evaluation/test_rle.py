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
from giantdet.evaluation import pasting, rle

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


def by_pixel(mask_SS: np.ndarray, box: list[float], at_pixel_centres: bool) -> np.ndarray:
    """The interpolated probability of every pixel of the image, in float64 by the references' formulas."""
    side = len(mask_SS)
    padded = np.pad(mask_SS.astype(np.float64), 1)
    weights = []
    for low, high, length in ((box[1], box[3], HEIGHT), (box[0], box[2], WIDTH)):
        if at_pixel_centres:
            extent = high - low if high > low else np.inf
            at = (np.arange(length) + 0.5 - low) / extent * side + 0.5 * (high > low)
        else:
            centre, half = (low + high) / 2, (high - low) / 2 * (side + 2) / side
            first, last = int(centre - half), int(centre + half)
            at = (np.arange(length) - first + 0.5) * (side + 2) / max(last - first + 1, 1) - 0.5
            at = np.where((np.arange(length) >= first) & (np.arange(length) <= last), at, 0)
        weights.append(np.maximum(1 - np.abs(at[:, None].clip(0, side + 1) - np.arange(side + 2)), 0))
    return weights[0] @ padded @ weights[1].T


@pytest.mark.parametrize("at_pixel_centres", [True, False], ids=["detectron2", "torchvision"])
@pytest.mark.parametrize("columns", [1, 100, 1 << 13])
@pytest.mark.parametrize("kind", ["random", "full", "half", "empty", "smooth", "sharp"])
def test_pasted_masks_equal_the_bitmap_of_the_image(
    kind: str, columns: int, at_pixel_centres: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels agree unless their probability is within rounding of 1/2, for any number of columns."""
    monkeypatch.setattr(pasting, "_COLUMNS", columns)
    boxes_D4 = boxes()
    generator = torch.Generator().manual_seed(1)
    random_DSS = torch.rand(len(boxes_D4), 28, 28, generator=generator)
    masks_DSS = {
        "random": random_DSS,
        "full": torch.ones(len(boxes_D4), 28, 28),
        "half": torch.full((len(boxes_D4), 28, 28), 0.5),
        "empty": torch.zeros(len(boxes_D4), 28, 28),
        "smooth": random_DSS[:, :1].expand(-1, 28, 28),
        "sharp": random_DSS.round(),
    }[kind]
    rles = rle.encode_pasted(masks_DSS, boxes_D4, (HEIGHT, WIDTH), at_pixel_centres)
    records, clear, inside = rles.records(), 0, 0
    for n, (found, box_4) in enumerate(zip(records, boxes_D4.tolist(), strict=True)):
        pasted = rle.decode_mask(found).numpy()
        assert found == coco(pasted), "the encoding equals pycocotools'"
        assert rles.areas_N[n] == pasted.sum()
        soft = by_pixel(masks_DSS[n].numpy(), box_4, at_pixel_centres)
        known = np.abs(soft - 0.5) > 1e-5
        assert (pasted == (soft > 0.5))[known].all(), box_4
        clear, inside = clear + known.sum(), inside + pasted.sum()
    assert clear > (0.7 if kind == "half" else 0.98) * len(records) * HEIGHT * WIDTH
    assert (inside > 0) == (kind != "empty") or (kind, at_pixel_centres) == ("half", False)


@pytest.mark.parametrize("at_pixel_centres", [True, False], ids=["detectron2", "torchvision"])
def test_a_value_of_one_half_counts_as_in_the_reference(at_pixel_centres: bool) -> None:
    """With cells of one pixel, the pixels have the mask's own values."""
    mask_SS = torch.tensor([0.5, 0.25, 0.5, 0.75, 0.5, 0.5, 1, 0.5]).expand(8, 8)
    # torchvision's box grows by a cell on each side, and ends with the whole pixel that it touches.
    box_4 = [2.0, 2, 10, 10] if at_pixel_centres else [2.4, 2.4, 9.6, 9.6]
    (found,) = rle.encode_pasted(mask_SS[None], torch.tensor([box_4]), (12, 12), at_pixel_centres).records()
    row = rle.decode_mask(found)[5, 2:10].tolist()
    limit = [True, False, True, True, True, True, True, True]
    assert row == (limit if at_pixel_centres else (mask_SS[0] > 0.5).tolist())


def test_nan_probabilities_give_no_mask() -> None:
    masks_DSS = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(4))
    masks_DSS[0, 2:4, 2:4], masks_DSS[1, 0], masks_DSS[2, 3] = float("nan"), float("inf"), -float("inf")
    boxes_D4 = torch.tensor([[2.5, 3, 15, 19]] * 3)
    with np.errstate(all="raise"):
        found = rle.encode_pasted(masks_DSS, boxes_D4, (20, 30), True)
    usual = masks_DSS.nan_to_num(0.0).clamp(0, 1)
    assert found.records() == rle.encode_pasted(usual, boxes_D4, (20, 30), True).records()


@pytest.mark.parametrize("seed", range(3))
def test_changes_of_many_masks_equal_pycocotools(seed: int) -> None:
    """Bitmaps with long and short runs, from the first pixel and to the last, and empty ones in between."""
    rng = np.random.default_rng(seed)
    bitmaps = [rng.random((HEIGHT, WIDTH)) < share for share in (0, 0.01, 0.5, 1, 0, 0, 0.99, 0.001, 1)]
    changes = [np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=False)) for mask in bitmaps]
    masks = np.repeat(np.arange(len(bitmaps)), [len(part) for part in changes])
    found = rle._encoded(np.concatenate(changes), masks, len(bitmaps), (HEIGHT, WIDTH))
    assert found.records() == [coco(mask) for mask in bitmaps]
    assert found.areas_N.tolist() == [mask.sum() for mask in bitmaps]
    again = rle.Rles.joined(
        [rle.Rles.of(found.records()[:4]), rle.Rles.of([]), rle.Rles.of(found.records()[4:])]
    )
    assert all((one == other).all() for one, other in zip(found, again, strict=True))


def test_a_box_that_is_not_finite_has_no_mask() -> None:
    for value in (float("nan"), float("inf")):
        boxes_14 = torch.tensor([[0, 0, 5, value]])
        (found,) = rle.encode_pasted(torch.ones(1, 4, 4), boxes_14, (20, 30), True).records()
        assert found == coco(np.zeros((20, 30), bool))


@pytest.mark.parametrize("at_pixel_centres", [True, False], ids=["detectron2", "torchvision"])
def test_a_huge_image_has_the_mask_of_a_small_one(at_pixel_centres: bool) -> None:
    """3.6 billion pixels, whose indices exceed 32 bits: the same object in a corner, and in the middle.

    Coordinates are multiples of 1/4, which float32 represents exactly at both places.
    """
    height, width, side = 60_000, 60_000, 80
    masks_DSS = torch.rand(2, 28, 28, generator=torch.Generator().manual_seed(2))
    boxes_D4 = torch.tensor([[3.25, 5.5, 61.0, 70.75], [10.0, 10.0, 42.5, 74.25]])
    small = rle.encode_pasted(masks_DSS, boxes_D4, (side, side), at_pixel_centres).records()
    for x, y in ((0, 0), (31_000, 12_345), (width - side, height - side)):
        moved_D4 = boxes_D4 + torch.tensor([x, y, x, y])
        huge = rle.encode_pasted(masks_DSS, moved_D4, (height, width), at_pixel_centres).records()
        for here, there in zip(small, huge, strict=True):
            assert there["size"] == [height, width]
            # Starts and ends of the runs, shifted: no run crosses columns in either image.
            counts = rle_counts(here["counts"].encode())
            turns = np.cumsum(np.array(counts, np.int64))[:-1]
            expected = (turns // side + x) * height + turns % side + y
            found = np.cumsum(np.array(rle_counts(there["counts"].encode()), np.int64))
            assert found[-1] == height * width
            assert (found[:-1] == expected).all()
            assert len(expected) > 100


def test_memory_does_not_grow_with_the_masks(tiny_export: Path) -> None:
    """Tiles need little more than the image; a whole image is also copied for scaling, 4 bytes a pixel."""
    script = Path(__file__).parents[1] / "engine/memory_of_masks.py"
    (ended,) = launch_ok(script, 1, tiny_export, fresh=True)
    before, in_tiles, whole = map(int, ended.out.split())
    image = 3 * 12_000**2 / 1e6
    assert in_tiles - before < image + 200, (before, in_tiles)
    assert whole - before < image * 7 / 3 + 200, (before, whole)
