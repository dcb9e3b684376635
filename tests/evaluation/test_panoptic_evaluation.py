"""Panoptic quality against the official code's numbers and against sets of pixels; the evaluator."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchmetrics.functional.detection import panoptic_quality

from giantdet.config.architectures.panoptic_fpn import PanopticFpnConfig, PanopticMergeConfig
from giantdet.config.classes import Classes
from giantdet.data.panoptic import PanopticMap, Segment, panoptic_png, read_panoptic_png
from giantdet.engine.predict import no_targets
from giantdet.errors import DataError
from giantdet.evaluation import EVALUATORS
from giantdet.evaluation.panoptic import (
    PanopticEvaluator,
    match_segments,
    merge,
    panoptic_scores,
)
from giantdet.structures import Batch, Detections, Outputs


def read(folder: Path, name: str) -> tuple[list[dict[str, Any]], list[PanopticMap]]:
    """Categories, things first, and the maps of a COCO panoptic set, by class number."""
    content = json.loads((folder / f"{name}.json").read_text())
    categories = sorted(content["categories"], key=lambda c: -c["isthing"])
    number = {category["id"]: k for k, category in enumerate(categories)}
    maps = []
    for record in content["annotations"]:
        ids = read_panoptic_png(folder / name / record["file_name"])
        parts = record["segments_info"]
        maps.append(
            PanopticMap(ids, [Segment(p["id"], number[p["category_id"]], bool(p["iscrowd"])) for p in parts])
        )
    return categories, maps


def disturbed(truth: PanopticMap, classes: int, image: int) -> PanopticMap:
    """An answer with all kinds of mistakes.

    The map is shifted by 4 rows and 7 columns; every 7th segment is lost, every 5th gets the next class,
    every 11th is merged into the one before, and the void becomes a segment in every second image.
    """
    ids = np.roll(truth.ids_HW, (4, 7), (0, 1))
    answer = np.zeros_like(ids)
    segments: list[Segment] = []
    for n, segment in enumerate(truth.segments, image):
        where = ids == segment.id
        if n % 7 == 0 or not where.any():
            continue
        if n % 11 == 0 and segments:
            answer[where] = segments[-1].id
            continue
        category = (segment.category + (n % 5 == 0)) % classes
        segments.append(Segment(len(segments) + 1, category))
        answer[where] = segments[-1].id
    if image % 2 and (ids == 0).any():
        segments.append(Segment(len(segments) + 1, 90))
        answer[ids == 0] = segments[-1].id
    return PanopticMap(answer, segments)


# PQ, SQ, RQ of all, things, stuff by cocodataset/panopticapi's evaluation.py at 1ad5afa on the same answers.
OFFICIAL = {
    "panopticapi_sample2": [
        *(0.22524048140708164, 0.3269533305497386, 0.33419465977605506),
        *(0.12291961379137953, 0.2703215741709215, 0.191952750092285),
        *(0.36848969606906457, 0.4062377894800825, 0.5333333333333333),
    ],
    "coco_panoptic200": [
        *(0.33275705353265167, 0.5841924542336255, 0.43467695665654316),
        *(0.303493023604691, 0.5472509879047123, 0.3933951117550354),
        *(0.37665309842459244, 0.6396046537269954, 0.4965997240088053),
    ],
}


@pytest.mark.parametrize("name", ["panopticapi_sample2", "coco_panoptic200"])
def test_official_numbers(shared: Path, name: str) -> None:
    categories, maps = read(shared / f"data/{name}/annotations", "panoptic_val")
    things, classes = sum(c["isthing"] for c in categories), len(categories)
    names = [category["name"] for category in categories]
    answers = [disturbed(truth, classes, i) for i, truth in enumerate(maps)]
    counts = sum(match_segments(t, a, classes) for t, a in zip(maps, answers, strict=True))
    scores = panoptic_scores(np.asarray(counts), names, things)
    found = [scores[f"{number}{kind}"] for kind in ("", "_th", "_st") for number in ("PQ", "SQ", "RQ")]
    assert found == pytest.approx(OFFICIAL[name], abs=1e-12)
    by_class = [pq for pq in scores["per_class"].values() if pq is not None]
    assert np.mean(by_class) == pytest.approx(scores["PQ"])


def by_sets(truth: PanopticMap, found: PanopticMap, classes: int) -> NDArray[np.float64]:
    """Compute the counts from the paper's definitions."""

    def pixels(panoptic: PanopticMap, number: int) -> set[int]:
        return set(np.flatnonzero(panoptic.ids_HW == number).tolist())

    void, counts = pixels(truth, 0), np.zeros((classes, 4))
    matched = set()
    for t in (segment for segment in truth.segments if not segment.is_crowd):
        true, hit = pixels(truth, t.id), False
        for f in found.segments:
            other = pixels(found, f.id)
            iou = len(true & other) / len((true | other) - void)
            if f.category == t.category and iou > 0.5:
                counts[t.category] += (iou, 1, 0, 0)
                matched.add(f.id)
                hit = True
        counts[t.category, 3] += not hit
    for f in found.segments:
        crowds = [pixels(truth, t.id) for t in truth.segments if t.is_crowd and t.category == f.category]
        other = pixels(found, f.id)
        counts[f.category, 2] += f.id not in matched and len(other & void.union(*crowds)) <= len(other) / 2
    return counts


@pytest.mark.parametrize("seed", range(8))
def test_matching_by_sets(seed: int) -> None:
    """Blocks of 8 classes and void on a small image; segment 3 is a crowd of a class that others have too."""
    rng = np.random.default_rng(seed)
    blocks = np.kron(rng.integers(0, 6, (4, 5)), np.ones((4, 4), np.int64)).astype(np.int32) * 1000
    found = np.where(rng.random(blocks.shape) < 0.2, rng.integers(0, 6, blocks.shape) * 1000, blocks)
    present = [n for n in range(1000, 6000, 1000) if (blocks == n).any()]
    truth = PanopticMap(blocks, [Segment(n, n // 2000, n == 3000) for n in present])
    kinds = [(n, (n // 2000 + (rng.random() < 0.2)) % 3) for n in range(1000, 6000, 1000)]
    answer = PanopticMap(found.astype(np.int32), [Segment(n, c) for n, c in kinds if (found == n).any()])
    assert match_segments(truth, answer, 3) == pytest.approx(by_sets(truth, answer, 3), abs=1e-12)


def test_unknown_ids() -> None:
    one = PanopticMap(np.ones((2, 2), np.int32), [Segment(1, 0)])
    with pytest.raises(ValueError, match="no segment has the id 1"):
        match_segments(one._replace(segments=[]), one, 1)


def test_classes_that_do_not_occur() -> None:
    counts = np.array([[0.8, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]])
    scores = panoptic_scores(counts, "abc", things=2)
    assert (scores["PQ"], scores["PQ_th"], scores["PQ_st"]) == (0.4, 0.8, 0.0)
    assert scores["SQ"] == 0.4 and scores["RQ"] == 0.5 and scores["per_class"]["b"] is None
    assert panoptic_scores(counts[:2], "ab", things=0)["PQ_th"] is None


def test_merging() -> None:
    """The better object is on top; too small rests, too low scores and too small stuff are dropped."""
    masks = np.zeros((4, 4, 8), bool)
    masks[0, :, :3] = masks[1, :, :4] = masks[2, :, 2:6] = masks[3, :, 6:] = True
    semantic = np.full((4, 8), 2)
    semantic[0], semantic[1, 7] = 0, 1
    scores, labels = np.array([0.9, 0.8, 0.95, 0.1], np.float32), np.array([1, 0, 0, 1])
    merged = merge(masks, scores, labels, semantic, num_classes=2, rule=PanopticMergeConfig(stuff_area=2))
    # Row 2 comes first; row 0 loses a third of itself, row 1 more than half; stuff 1 has only one pixel.
    assert merged.rows == [2, 0, -1]
    assert merged.panoptic.segments == [Segment(1, 0), Segment(2, 1), Segment(3, 3)]
    expected = np.tile([2, 2, 1, 1, 1, 1, 3, 3], (4, 1))
    expected[0, 6:], expected[1, 7] = 0, 0
    assert (merged.panoptic.ids_HW == expected).all()


CLASSES = Classes(objects=((7, "cat"), (9, "dog")), semantic=((0, "things"), (20, "sky"), (30, "road")))


class Panoptics:
    """The part of a data set that the evaluator uses: objects 7, 9; stuff 20, 30."""

    image_ids = np.array([5, 6])
    annotated = True

    def __init__(self, maps: list[PanopticMap | None]) -> None:
        self.maps = maps

    def panoptic_map(self, i: int) -> PanopticMap | None:
        return self.maps[i]

    def path(self, i: int) -> Path:
        return Path(f"{i}.jpg")


def evaluator(maps: list[PanopticMap | None]) -> PanopticEvaluator:
    data: Any = Panoptics(maps)
    return PanopticEvaluator(data, ["panoptic"], CLASSES, PanopticFpnConfig(type="panoptic_fpn"))


def example_answer() -> tuple[Outputs, Batch]:
    """A dog on the left half of a road; the other image has only things. Images are twice the canvas."""
    semantic = torch.zeros(2, 3, 16, 16)
    semantic[0, 2], semantic[1, 0] = 1.0, 1.0
    boxes = torch.tensor([[[0.0, 0, 32, 64], [0, 0, 32, 64]]]).repeat(2, 1, 1)
    detections = Detections(
        boxes_BD4=boxes,
        scores_BD=torch.tensor([[0.9, 0.8], [0.4, 0.3]]),
        labels_BD=torch.tensor([[1, 0], [0, 0]]),
        valid_BD=torch.tensor([[True, False], [True, True]]),
        masks_BDSS=torch.ones(2, 2, 28, 28),
    )
    images, numbers = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.arange(2)
    batch = Batch(
        images,
        torch.full((2, 2), 64.0),
        no_targets(2),
        numbers,
        torch.tensor([5, 6]),
        torch.full((2, 2), 128),
    )
    return Outputs(detections, semantic), batch


def test_evaluator(tmp_path: Path) -> None:
    """The result is written in COCO's format with the data set's ids, scored, and printed."""
    ids = np.full((128, 128), 70000, np.int32)
    ids[:, :64], ids[:10] = 11, 0
    judge = evaluator([PanopticMap(ids, [Segment(70000, 30), Segment(11, 9)]), None])
    judge.add(*example_answer())
    judge.merge()
    scores = judge.scores()["panoptic"]
    # Void pixels do not count; the pasted mask lacks some pixels at its corners.
    assert [scores[name] for name in ("PQ", "PQ_th", "SQ_st", "RQ")] == pytest.approx([1.0] * 4, abs=1e-3)
    assert [k for k, v in scores["per_class"].items() if v is not None] == ["dog", "road"]
    assert "road  1.000" in judge.table(judge.scores())
    judge.save(tmp_path / "results.json")
    (record,) = json.loads((tmp_path / "results_panoptic.json").read_text())["annotations"]
    written = read_panoptic_png(tmp_path / "results_panoptic" / record["file_name"])
    categories = {info["id"]: info["category_id"] for info in record["segments_info"]}
    assert record["image_id"] == 5 and categories[written[64, 10]] == 9 and categories[written[64, 90]] == 30


def test_missing_maps_and_mismatched_maps() -> None:
    judge = evaluator([None, None])
    judge.add(*example_answer())
    judge.merge()
    assert judge.scores() == {} and judge.table({}) == ""
    with pytest.raises(DataError, match=r"0\.jpg: category 8 is none"):
        evaluator([PanopticMap(np.ones((128, 128), np.int32), [Segment(1, 8)]), None]).add(*example_answer())
    with pytest.raises(DataError, match=r"0\.jpg: no segment has the id 1"):
        evaluator([PanopticMap(np.ones((128, 128), np.int32), []), None]).add(*example_answer())
    with pytest.raises(DataError, match=r"0\.jpg has \(5, 5\) pixels"):
        evaluator([PanopticMap(np.zeros((5, 5), np.int32), []), None]).add(*example_answer())


def test_png() -> None:
    ids = np.array([[0, 1, 255], [256, 70000, 2**24 - 1]], np.int32)
    assert (read_panoptic_png(BytesIO(panoptic_png(ids))) == ids).all()


def test_is_one_of_the_metrics() -> None:
    assert PanopticEvaluator in EVALUATORS


@pytest.mark.parametrize("seed", range(4))
def test_torchmetrics(seed: int) -> None:
    """Maps without crowds and void; torchmetrics also excludes predicted void from the union."""
    rng = np.random.default_rng(seed)
    category = {1: 0, 2: 0, 3: 1, 4: 2, 5: 2, 6: 3, 7: 4, 8: 5}  # 3 classes of things, 3 of stuff
    blocks = np.kron(rng.integers(1, 9, (6, 7)), np.ones((6, 6), np.int64)).astype(np.int32)
    noise = rng.random(blocks.shape) < rng.choice([0.1, 0.4], blocks.shape[1])
    found = np.where(noise, rng.integers(1, 9, blocks.shape), blocks).astype(np.int32)
    maps = [
        PanopticMap(ids, [Segment(n, c) for n, c in category.items() if (ids == n).any()])
        for ids in (found, blocks)
    ]
    kinds = [np.vectorize(category.__getitem__)(panoptic.ids_HW) for panoptic in maps]
    pairs = [
        torch.from_numpy(np.stack([kind, np.where(kind < 3, panoptic.ids_HW, 0)], -1))[None].long()
        for kind, panoptic in zip(kinds, maps, strict=True)
    ]
    theirs = panoptic_quality(*pairs, things={0, 1, 2}, stuffs={3, 4, 5}, return_per_class=True)
    ours = panoptic_scores(match_segments(maps[1], maps[0], 6), "abcdef", 3)["per_class"]
    assert list(ours.values()) == pytest.approx(theirs.flatten().tolist(), abs=1e-6)  # float32
    assert 0 < theirs.max() < 1
