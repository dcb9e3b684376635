"""Prediction in tiles, against the predictor applied to crops by hand and against pycocotools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_util
from torchvision.ops import batched_nms

from giantdet import cli, load_predictor
from giantdet.engine.tiles import BORDER, Tile, kept_in_tile, shifted_rle, tiles_of

PIXELS = np.random.default_rng(1).integers(0, 256, (100, 150, 3), dtype=np.uint8)


def encode_mask(mask_HW: torch.Tensor) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask_HW.numpy().astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


@pytest.mark.parametrize("size_hw", [(100, 150), (64, 65), (64, 64), (20, 300), (7, 9)])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5, 0.99])
def test_tiles_cover_the_image(size_hw: tuple[int, int], overlap: float) -> None:
    seen_HW = np.zeros(size_hw, int)
    tiles = tiles_of(size_hw, 64, overlap)
    for tile in tiles:
        seen_HW[tile.top : tile.bottom, tile.left : tile.right] += 1
        assert tile.bottom - tile.top == min(64, size_hw[0])
        assert tile.right - tile.left == min(64, size_hw[1])
        if tile.inner_left is not None:
            assert tile.inner_left - tile.left >= round(64 * overlap) - 1
    assert seen_HW.min() >= 1 and len(set(tiles)) == len(tiles)
    assert len(tiles) == 1 or max(size_hw) > 64


def test_invalid_tiles() -> None:
    for side, overlap in ((0, 0.2), (64, 1.0), (64, -0.1), (64, float("nan"))):
        with pytest.raises(ValueError, match="tile"):
            tiles_of((10, 10), side, overlap)


def test_every_object_smaller_than_the_overlap_is_kept_whole() -> None:
    """The detections of a tile are perfect: the visible parts of its objects."""
    rng = np.random.default_rng(0)
    corners_N2 = rng.integers(0, [136, 86], (3000, 2))
    boxes_N4 = torch.from_numpy(np.hstack([corners_N2, corners_N2 + rng.integers(4, 14, (3000, 2))])).float()
    times_N = torch.zeros(3000)
    for tile in tiles_of((100, 150), 64, 0.3):
        limits_4 = torch.tensor([tile.left, tile.top, tile.right, tile.bottom]).float()
        part_N4 = torch.cat([boxes_N4[:, :2].maximum(limits_4[:2]), boxes_N4[:, 2:].minimum(limits_4[2:])], 1)
        seen_N = (part_N4[:, 2:] > part_N4[:, :2]).all(1) & kept_in_tile(part_N4, tile)
        assert torch.equal(part_N4[seen_N], boxes_N4[seen_N]), "only whole objects are kept"
        times_N += seen_N
    assert times_N.min() >= 1


def test_an_object_larger_than_the_overlap_is_cut() -> None:
    tile = Tile(0, 0, 64, 64, None, None, None, inner_right=50)
    boxes_D4 = torch.tensor([[49.0, 5, 64, 9], [53, 5, 64, 9], [53, 5, 61, 9], [53, 60, 61, 64]])
    assert BORDER == 2
    assert kept_in_tile(boxes_D4, tile).tolist() == [True, False, True, True]


def test_masks_equal_pycocotools() -> None:
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (5, 7), (9, 4), (12, 10), (12, 3), (2, 10)]
    for trial in range(1500):
        h, w = sizes[trial % len(sizes)]
        top, left = int(rng.integers(0, 12 - h + 1)), int(rng.integers(0, 10 - w + 1))
        tile_hw = rng.random((h, w)) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        if trial % 5 == 0:
            tile_hw[:] = False
            tile_hw[rng.integers(h), rng.integers(w)] = True
        image_HW = np.zeros((12, 10), bool)
        image_HW[top : top + h, left : left + w] = tile_hw
        shifted = shifted_rle(encode_mask(torch.from_numpy(tile_hw)), (top, left), (12, 10))
        assert shifted == encode_mask(torch.from_numpy(image_HW))


def test_tiled_prediction_equals_brute_force(tiny_export: Path) -> None:
    predictor = load_predictor(tiny_export, "cpu")
    found = predictor(PIXELS, 0.0, tile=64, tile_overlap=0.25)
    boxes, scores, labels, masks = [], [], [], []
    starts_y, starts_x = [0, 36], [0, 48, 86]
    for j, y in enumerate(starts_y):
        for i, x in enumerate(starts_x):
            part = predictor(np.ascontiguousarray(PIXELS[y : y + 64, x : x + 64]), 0.0)
            for d, (x0, y0, x1, y1) in enumerate(part.boxes_D4.tolist()):
                if i > 0 and x0 <= 2 and x1 + x < starts_x[i - 1] + 62:
                    continue
                if i < 2 and x1 >= 62 and x0 + x > starts_x[i + 1] + 2:
                    continue
                if j > 0 and y0 <= 2 and y1 + y < starts_y[j - 1] + 62:
                    continue
                if j < 1 and y1 >= 62 and y0 + y > starts_y[j + 1] + 2:
                    continue
                mask_HW = torch.zeros(100, 150, dtype=torch.bool)
                mask_HW[y : y + 64, x : x + 64] = part.mask(d)
                boxes.append([x0 + x, y0 + y, x1 + x, y1 + y])
                scores.append(float(part.scores_D[d]))
                labels.append(int(part.labels_D[d]))
                masks.append(mask_HW)
    boxes_D4, scores_D, labels_D = torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels)
    best_D = batched_nms(boxes_D4, scores_D, labels_D, 0.5)
    assert 10 < len(best_D) < len(boxes), "more than the model's limit per image, and NMS removes some"
    torch.testing.assert_close(found.boxes_D4, boxes_D4[best_D])
    assert torch.equal(found.scores_D, scores_D[best_D]) and torch.equal(found.labels_D, labels_D[best_D])
    assert found.rles_D == [encode_mask(masks[d]) for d in best_D.tolist()]
    assert len(found.to_coco(1)) == len(found.names) == len(best_D) and found.size_hw == (100, 150)


def test_an_image_of_one_tile_is_predicted_as_without_tiles(tiny_export: Path) -> None:
    predictor = load_predictor(tiny_export, "cpu")
    assert predictor(PIXELS, 0.0, tile=150).to_coco(1) == predictor(PIXELS, 0.0).to_coco(1)
    nothing = predictor(PIXELS, 1.0, tile=64)
    assert nothing.rles_D == [] and nothing.boxes_D4.shape == (0, 4) and nothing.size_hw == (100, 150)
    assert len(predictor([PIXELS, PIXELS], 0.0, tile=64)) == 2


def test_command(tiny_export: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    arguments = ["predict", str(tiny_export), str(tmp_path / "a.png"), "--threshold", "0"]
    arguments += ["--output", str(tmp_path / "out"), "--tile", "64"]
    assert cli.main([*arguments, "--tile-overlap", "0.25"]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    predictor = load_predictor(tiny_export)
    assert len(results) == len(predictor(PIXELS, 0.0, 64, 0.25).names) > 10
    assert cli.main([*arguments, "--tile-overlap", "1"]) == 2
    assert "the overlap of tiles" in capsys.readouterr().err
    monkeypatch.setattr(type(predictor.detector), "tasks", ("semantic", "panoptic"))
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "eval.window_stride" in error and error.count("\n") == 1
