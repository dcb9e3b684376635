"""Geometry and mask frames against independent full-image computations, on synthetic and real data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_util
from torchvision.ops import roi_align

from giantdet.config.types import AugmentConfig, DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.demo import make_demo
from giantdet.data.loader import train_loader
from giantdet.data.masks import (
    Runs,
    decode_window,
    frame_of,
    mask_runs,
    object_frames,
    rle_counts,
    rle_runs,
    to_frames,
)
from giantdet.data.transforms import (
    Geometry,
    clip_boxes,
    draw_geometry,
    transform_boxes,
    transform_image,
    transform_semantic,
)
from giantdet.errors import DataError
from giantdet.structures import IGNORE


def full_coverage(mask_hw: NDArray[np.bool_], geometry: Geometry) -> NDArray[np.float64]:
    """The mask's exact area coverage on the canvas: repeat pixels to a common multiple, then average."""
    values = mask_hw.astype(np.float64)
    for axis in (0, 1):
        source, resized = geometry.source_hw[axis], geometry.resized_hw[axis]
        values = np.repeat(values, resized, axis=axis)
        shape = list(values.shape)
        shape[axis : axis + 1] = [resized, source]
        values = values.reshape(shape).mean(axis=axis + 1)
    if geometry.flip:
        values = values[:, ::-1]
    if geometry.flip_y:
        values = values[::-1]
    (top, left), (height, width) = geometry.offset_yx, geometry.size_hw
    return values[top : top + height, left : left + width]


def expected_cells(full: NDArray[np.float64], frame: NDArray[np.float32], side: int) -> NDArray[np.float64]:
    """Sample 1-pixel cells from the full bitmap, with its border repeated outside."""
    rows = np.clip(np.arange(side) + int(frame[1]), 0, full.shape[0] - 1)
    columns = np.clip(np.arange(side) + int(frame[0]), 0, full.shape[1] - 1)
    return full[rows][:, columns]


GEOMETRIES = [
    Geometry((30, 40), (30, 40), (0, 0), (30, 40), False),
    Geometry((30, 40), (30, 40), (3, 5), (25, 20), True),
    Geometry((30, 40), (48, 64), (0, 0), (48, 64), False),
    Geometry((30, 40), (48, 65), (0, 0), (48, 65), True),
    Geometry((30, 40), (20, 26), (0, 0), (20, 26), True),
    Geometry((30, 40), (75, 100), (20, 31), (50, 60), True),
    Geometry((30, 40), (75, 100), (25, 40), (50, 60), False),
    Geometry((30, 40), (30, 40), (3, 5), (25, 20), False, flip_y=True),
    Geometry((30, 40), (48, 65), (0, 0), (48, 65), False, flip_y=True),
    Geometry((30, 40), (75, 100), (20, 31), (50, 60), True, flip_y=True),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_frames_equal_full_bitmaps(geometry: Geometry) -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        mask = np.zeros((30, 40), bool)
        y, x = rng.integers(0, 24), rng.integers(0, 34)
        mask[y : y + 9, x : x + 9] = rng.random(mask[y : y + 9, x : x + 9].shape) < 0.6
        mask[y, x] = mask[min(y + 5, 29), min(x + 5, 39)] = True
        rows, columns = np.nonzero(mask)
        box = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], np.float64)
        box = clip_boxes(transform_boxes(box, geometry), geometry)[0]
        if (box[2:] - box[:2] < 1).any():
            continue
        cells, frame = (found[0] for found in to_frames([mask_runs(mask)], geometry, box[None], 40))
        assert (frame[2:] - frame[:2] == 40).all() and (frame == np.round(frame)).all()
        expected = expected_cells(full_coverage(mask, geometry), frame, 40)
        assert np.abs(cells - expected * 255).max() <= 0.51
        if geometry.resized_hw == geometry.source_hw:
            assert set(np.unique(cells)) <= {0, 255}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_image_and_boxes_follow_the_masks(geometry: Geometry) -> None:
    mask = np.zeros((30, 40), bool)
    mask[8:20, 12:30] = True
    image = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    canvas = transform_image(image, geometry, (110, 120), exact=False)
    height, width = geometry.size_hw
    assert not canvas[height:].any() and not canvas[:, width:].any()
    full = full_coverage(mask, geometry)
    # bilinear interpolation and area averages differ only next to the edge
    assert ((canvas[:height, :width, 0] > 127) != (full > 0.5)).sum() <= 0.02 * full.size
    box = clip_boxes(transform_boxes(np.array([[12, 8, 30, 20]]), geometry), geometry)[0]
    rows, columns = np.nonzero(full >= 0.5)
    around = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert np.abs(box - around).max() <= 0.51


def test_crop_equals_crop_of_the_whole() -> None:
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    whole = np.asarray(Image.fromarray(image).resize((130, 97), Image.Resampling.BILINEAR))[:, ::-1]
    canvas = transform_image(
        image, Geometry((60, 80), (97, 130), (20, 33), (64, 64), True), (64, 64), exact=False
    )
    assert np.abs(canvas.astype(int) - whole[20:84, 33:97]).max() <= 1


def test_frame_rule() -> None:
    for low, high, side in [(3.2, 8.9, 16), (0, 14, 16), (0, 14.1, 16), (5, 300, 16), (7.5, 7.6, 28)]:
        frame = frame_of(np.array([low, 0, high, 1.0]), side).astype(float)
        cell = (frame[2] - frame[0]) / side
        assert frame[0] <= np.floor(low) - cell + 1e-4 and frame[2] >= np.ceil(high) + cell - 1e-4
        assert cell == 1 if np.ceil(high) - np.floor(low) <= side - 2 else cell > 1
        assert frame[3] - frame[1] == side, "the axes are independent"


def test_geometry_of_evaluation_and_multi_scale() -> None:
    rng = np.random.default_rng(0)
    config = DataConfig(size=(1024, 1344), short_side=800, augment=AugmentConfig(short_sides=(640, 800)))
    assert draw_geometry(rng, (480, 640), config, False) == Geometry(
        (480, 640), (800, 1067), (0, 0), (800, 1067), False
    )
    assert draw_geometry(rng, (200, 640), config, False).resized_hw == (420, 1344), "the largest that fits"
    assert draw_geometry(rng, (2000, 1), config, False).size_hw == (1024, 1)
    limited = DataConfig(size=(1344, 1344), short_side=800, long_side=1333)
    for size, expected in (((480, 640), (800, 1067)), ((480, 800), (800, 1333)), ((800, 300), (1333, 500))):
        assert draw_geometry(rng, size, limited, False).resized_hw == expected, "same as mmdetection's Resize"
    drawn = [draw_geometry(rng, (480, 640), config, True) for _ in range(200)]
    assert {g.resized_hw[0] for g in drawn} == {640, 800}
    assert 70 < sum(g.flip for g in drawn) < 130


def test_large_scale_jitter() -> None:
    rng = np.random.default_rng(0)
    config = DataConfig(size=(256, 256), augment=AugmentConfig(jitter=(0.1, 2.0), flip=0.0))
    drawn = [draw_geometry(rng, (120, 160), config, True) for _ in range(500)]
    scales = np.array([g.resized_hw[1] / 256 for g in drawn])
    assert 0.1 <= scales.min() < 0.15 and 1.9 < scales.max() <= 2.0
    for g in drawn:
        for axis in (0, 1):
            assert g.size_hw[axis] == min(g.resized_hw[axis], 256)
            assert 0 <= g.offset_yx[axis] <= g.resized_hw[axis] - g.size_hw[axis]
    assert len({g.offset_yx for g in drawn}) > 100 and not any(g.flip for g in drawn)


def test_run_lengths_equal_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for size in ((1, 1), (7, 5), (40, 30), (600, 900)):
        for density in (0.0, 0.01, 0.5, 1.0):
            mask = rng.random(size) < density
            rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
            assert rle_counts(rle["counts"]).sum() == mask.size
            assert (decode_window(rle["counts"], size, (0, 0, *size)) == mask).all()
            y, x = size[0] // 3, size[1] // 4
            assert (decode_window(rle["counts"], size, (y, x, *size)) == mask[y:, x:]).all()
            for runs in (rle_runs(rle["counts"], size), mask_runs(mask)):
                assert (painted(runs, size) == mask).all()
    for broken in (b"", b"P", rle["counts"][:-1], b"\xff\xfe"):
        with pytest.raises(DataError, match=r"annotation 7: its RLE does not add up to 600 x 900"):
            decode_window(broken, (600, 900), (0, 0, 600, 900), 7)
        with pytest.raises(DataError, match=r"annotation 7: its RLE does not add up to 600 x 900"):
            rle_runs(broken, (600, 900), 7)
    # Runs without pixels in the middle, and one across three columns.
    rle = mask_util.frPyObjects({"counts": [1, 0, 2, 9, 3, 0, 1, 4], "size": [4, 5]}, 4, 5)
    assert (painted(rle_runs(rle["counts"], (4, 5)), (4, 5)) == mask_util.decode(rle)).all()


def painted(runs: Runs, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Paint the mask of runs, each covering pixels that no other run covers."""
    counts = np.zeros(size_hw, int)
    for x, top, bottom in zip(*runs, strict=True):
        counts[top:bottom, x] += 1
    assert counts.max(initial=0) <= 1
    return counts.astype(bool)


def test_a_mask_larger_than_its_box_is_kept(tmp_path: Path) -> None:
    make_demo(tmp_path, 2, 0, size=64)
    dataset = CocoDataset(tmp_path / "train.json", tmp_path / "train")
    objects = dataset.objects(int(dataset.nonempty[0]))
    geometry = Geometry((64, 64), (64, 64), (0, 0), (64, 64), False)
    x0, y0, x1, y1 = objects.boxes_N4[0].astype(float)
    inner = np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1, y1])
    cells = object_frames(objects, np.array([0]), geometry, inner[None], 80)[0][0]
    assert (cells == 255).sum() >= objects.masks()[0].sum()


def compare(cells: NDArray, frame: NDArray, full: torch.Tensor, box: NDArray) -> tuple[float, float]:
    """IoU of the mask on the canvas and share of wrong cells in the 28 x 28 target, against a full bitmap."""
    side, (height, width) = len(cells), full.shape
    cells_t = torch.from_numpy(cells.astype(np.float32) / 255)[None, None]
    box_t = torch.tensor(box, dtype=torch.float32)[None]
    cell, origin = torch.from_numpy((frame[2:] - frame[:2]) / side).repeat(2), torch.from_numpy(frame[:2])
    want = roi_align(full[None, None], [box_t], 28, aligned=True) >= 0.5
    in_frame = (box_t - origin.repeat(2)) / cell
    have = roi_align(cells_t, [in_frame], 28, aligned=True, sampling_ratio=4) >= 0.5
    # back to the canvas: the frame sampled at the pixel centres
    y = (torch.arange(height) + 0.5 - frame[1]) / (frame[3] - frame[1])
    x = (torch.arange(width) + 0.5 - frame[0]) / (frame[2] - frame[0])
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None].float() * 2 - 1
    back = torch.nn.functional.grid_sample(cells_t, grid, align_corners=False)[0, 0] >= 0.5
    whole = full >= 0.5
    iou = (back & whole).sum() / (back | whole).sum().clamp_min(1)
    return float(iou), (want != have).float().mean().item()


# Measured on 20 images of val, the first 12 objects of each (the test takes fewer): mean and minimum IoU of
# masks, mean share of wrong target cells. First against bitmaps of exact coverage, then against bitmaps
# scaled to the nearest pixel, as detectron2 does.
MEASURED = {
    "coco_panoptic200": ((0.9955, 0.979, 0.00065), (0.9932, 0.978, 0.0080)),
    "dsb2018_nuclei": ((0.9993, 0.989, 0.00073), (0.9903, 0.930, 0.0123)),
    "fruits_nuts": ((0.9962, 0.993, 0.00034), (0.9944, 0.990, 0.0026)),
}


@pytest.mark.parametrize("name", list(MEASURED))
def test_error_of_frames_on_real_masks(shared: Path, name: str) -> None:
    folder = shared / "data" / name
    dataset = CocoDataset(folder / "annotations/instances_val.json", folder / "images")
    config, side = DataConfig(size=(1024, 1024), short_side=800), 112
    found: tuple[list[tuple[float, float]], ...] = ([], [])
    for i in range(0, len(dataset), max(len(dataset) // 8, 1)):
        objects, size = dataset.objects(i), tuple(int(v) for v in dataset.sizes_hw[i])
        geometry = draw_geometry(np.random.default_rng(0), size, config, False)
        boxes = clip_boxes(transform_boxes(objects.boxes_N4, geometry), geometry)
        height, width = geometry.size_hw
        bitmaps, frames = object_frames(objects, np.arange(len(objects)), geometry, boxes, side)
        for n, mask in enumerate(objects.masks()[:5]):
            cells, frame = bitmaps[n], frames[n]
            # 1-pixel cells over the whole canvas, which `test_frames_equal_full_bitmaps` checks to be exact
            (exact,), (at,) = to_frames([mask_runs(mask)], geometry, boxes[n : n + 1], 2100)
            top, left = -int(at[1]), -int(at[0])
            coverage = torch.from_numpy(exact[top : top + height, left : left + width] / np.float32(255))
            nearest = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
            found[0].append(compare(cells, frame, coverage, boxes[n]))
            found[1].append(compare(cells, frame, torch.from_numpy(np.array(nearest, np.float32)), boxes[n]))
    assert len(found[0]) >= 20
    for values, (mean, least, wrong) in zip(found, MEASURED[name], strict=True):
        iou, cells_wrong = np.array(values).T
        print(f"{name}: {len(values)}, IoU {iou.mean():.4f} {iou.min():.4f}, wrong {cells_wrong.mean():.5f}")
        assert iou.mean() >= mean - 0.003 and iou.min() >= least - 0.01 and cells_wrong.mean() <= wrong * 1.5


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_semantic_map_follows_the_image(geometry: Geometry) -> None:
    """Pixels of each class lie where that class's mask covers the canvas; the padding is ignored."""
    classes_HW = np.random.default_rng(0).integers(0, 4, (5, 8), dtype=np.uint8).repeat(6, 0).repeat(5, 1)
    found = transform_semantic(classes_HW, geometry, (80, 110))
    height, width = geometry.size_hw
    assert found.dtype == np.uint8
    assert (found[height:] == IGNORE).all() and (found[:, width:] == IGNORE).all()
    inside = found[:height, :width]
    for c in range(4):
        coverage = full_coverage(classes_HW == c, geometry)
        assert (inside[coverage > 0.999] == c).all()
        assert (inside[coverage < 0.001] != c).all()


class WithMaps(CocoDataset):
    """The demo set with a semantic map per image: the row number plus the column number, modulo 5."""

    def semantic_map(self, i: int) -> NDArray[np.uint8]:
        height, width = self.sizes_hw[i]
        return ((np.arange(height)[:, None] + np.arange(width)) % 5).astype(np.uint8)


def test_a_batch_has_the_requested_targets(demo_data: Path) -> None:
    config = DataConfig(size=(64, 96), short_side=64, max_objects=3, mask_frame=14, workers=0)
    dataset = WithMaps(demo_data / "train.json", demo_data / "train")
    shapes = {
        frozenset({"boxes"}): (3, 0, (0, 0)),
        frozenset({"boxes", "masks"}): (3, 14, (0, 0)),
        frozenset({"semantic"}): (0, 0, (64, 96)),
        frozenset({"boxes", "masks", "semantic"}): (3, 14, (64, 96)),
    }
    for wanted, (slots, side, canvas) in shapes.items():
        targets = next(train_loader(dataset, config, 2, targets=wanted)).targets
        assert targets.boxes_BM4.shape == (2, slots, 4)
        assert targets.masks_BMSS.shape == (2, slots, side, side)
        assert targets.semantic_BHW.shape == (2, *canvas)
    assert set(targets.semantic_BHW[:, :64, :64].unique().tolist()) == {0, 1, 2, 3, 4}
    assert (targets.semantic_BHW[:, :, 64:] == IGNORE).all()


def test_missing_maps_are_an_error(demo_data: Path) -> None:
    config = DataConfig(size=(64, 64), short_side=64, workers=0)
    dataset = CocoDataset(demo_data / "train.json", demo_data / "train")
    with pytest.raises(DataError, match="no semantic maps, which the model needs"):
        next(train_loader(dataset, config, 1, targets=frozenset({"semantic"})))
