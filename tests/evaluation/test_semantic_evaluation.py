"""Scores of semantic maps against loops over pixels, and mapping back to the image against detectron2's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from giantdet.config.architectures.semantic_fpn import SemanticFpnConfig
from giantdet.config.classes import Classes
from giantdet.engine.predict import no_targets
from giantdet.errors import DataError
from giantdet.evaluation import EVALUATORS, semantic
from giantdet.evaluation.semantic import SemanticEvaluator, confusion, semantic_scores, whole_image_classes
from giantdet.structures import IGNORE, Batch, Outputs

COUNT, SIZE = 4, (24, 32)
NAMES = ("sky", "road", "tree", "sea")
CLASSES = Classes(semantic=tuple(enumerate(NAMES)))


class Maps:
    """The part of a data set that the evaluator uses."""

    def __init__(self, maps: list[NDArray[np.uint8] | None]) -> None:
        self.maps, self.image_ids = maps, np.arange(len(maps)) + 10

    def semantic_map(self, i: int) -> NDArray[np.uint8] | None:
        return self.maps[i]

    def path(self, i: int) -> Path:
        return Path(f"{i}.jpg")


def evaluator(maps: list[NDArray[np.uint8] | None]) -> SemanticEvaluator:
    data: Any = Maps(maps)
    return SemanticEvaluator(data, ["semantic"], CLASSES, SemanticFpnConfig(type="semantic_fpn"))


def batch_of(ids: list[int], originals: list[tuple[int, int]]) -> Batch:
    """Images that fill the canvas."""
    images = torch.zeros(len(ids), 3, *SIZE, dtype=torch.uint8)
    sizes = torch.tensor([SIZE] * len(ids)).float()
    numbers = torch.arange(len(ids))
    return Batch(images, sizes, no_targets(len(ids)), numbers, torch.tensor(ids), torch.tensor(originals))


def logits_of(classes_Bhw: Tensor) -> Tensor:
    """Logits at stride 4 whose best class is known."""
    return torch.nn.functional.one_hot(classes_Bhw, COUNT).permute(0, 3, 1, 2).float()


def by_loops(pairs: list[tuple[NDArray[np.uint8], NDArray[np.int64]]]) -> dict[str, Any]:
    """Compute the scores from the definitions, with sets of pixels."""
    true, found = set[tuple[int, int, int]](), set[tuple[int, int, int]]()
    for i, (truth, answer) in enumerate(pairs):
        for n, (t, f) in enumerate(zip(truth.flat, answer.flat, strict=True)):
            if t != IGNORE:
                true.add((i, n, int(t)))
                found.add((i, n, int(f)))
    iou, accuracy = [], []
    for c in range(COUNT):
        a, b = ({pixel for pixel in pixels if pixel[2] == c} for pixels in (true, found))
        iou.append(len(a & b) / len(a | b) if a else math.nan)
        accuracy.append(len(a & b) / len(a) if a else math.nan)
    return {
        "mIoU": np.nanmean(iou),
        "mACC": np.nanmean(accuracy),
        "pACC": len(true & found) / len(true),
        "per_class": dict(zip(NAMES, iou, strict=True)),
    }


def random_maps(count: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Maps in which class 3 does not occur."""
    rng = np.random.default_rng(seed)
    return [rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (20 + 3 * i, 30 + i)) for i in range(count)]


@pytest.mark.parametrize("limit", [semantic._LOGITS_BYTES, 1])
def test_scores_by_loops(limit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three images in two batches with one padding slot; all classes at once, and one at a time."""
    monkeypatch.setattr(semantic, "_LOGITS_BYTES", limit)
    maps = random_maps(3)
    judge = evaluator(list(maps))
    small = torch.randint(0, COUNT, (4, 6, 8), generator=torch.Generator().manual_seed(0))
    batches = [
        batch_of([10, 12], [maps[0].shape, maps[2].shape]),
        batch_of([11, -1], [maps[1].shape, SIZE]),
    ]
    pairs = []
    for b, batch in enumerate(batches):
        logits = logits_of(small[2 * b : 2 * b + 2])
        judge.add(Outputs(semantic_BCHW=logits), batch)
        for i, image_id in enumerate(batch.image_ids_B.tolist()):
            if image_id >= 0:
                large = torch.nn.functional.interpolate(logits[i : i + 1], size=SIZE, mode="bilinear")
                size = tuple(batch.original_sizes_B2[i].tolist())
                resized = torch.nn.functional.interpolate(large, size=size, mode="bilinear")[0].argmax(0)
                pairs.append((maps[image_id - 10], resized.numpy()))
    judge.merge()
    scores, expected = judge.scores()["semantic"], by_loops(pairs)
    classes, wanted = scores.pop("per_class"), expected.pop("per_class")
    assert scores == pytest.approx(expected, abs=1e-12)
    assert classes.pop("sea") is None and math.isnan(wanted.pop("sea"))
    assert classes == pytest.approx(wanted, abs=1e-12)
    table = judge.table(judge.scores())
    assert "mIoU" in table and f"road  {classes['road']:.3f}" in table
    judge.save(tmp_path / "results.json")
    saved = json.loads((tmp_path / "results_semantic.json").read_text())
    assert saved["classes"] == [*NAMES, "none"]
    assert np.sum(saved["confusion"]) == sum((m != IGNORE).sum() for m in maps)


def test_without_maps_there_are_no_scores() -> None:
    judge = evaluator([None])
    judge.add(Outputs(semantic_BCHW=torch.zeros(1, COUNT, 6, 8)), batch_of([10], [SIZE]))
    judge.merge()
    assert judge.scores() == {} and judge.table({}) == ""


def test_mismatched_maps() -> None:
    outputs = Outputs(semantic_BCHW=torch.zeros(1, COUNT, 6, 8))
    with pytest.raises(DataError, match=r"0\.jpg: class 9 is none of the model's 4"):
        evaluator([np.full(SIZE, 9, np.uint8)]).add(outputs, batch_of([10], [SIZE]))
    with pytest.raises(DataError, match=r"has \(5, 5\) pixels"):
        evaluator([np.zeros((5, 5), np.uint8)]).add(outputs, batch_of([10], [SIZE]))


def test_a_perfect_answer() -> None:
    truth = torch.from_numpy(random_maps(1)[0])
    scores = semantic_scores(confusion(truth, truth.where(truth != IGNORE, 3), COUNT), "abcd")
    assert scores["mIoU"] == scores["mACC"] == scores["pACC"] == 1.0


@pytest.mark.parametrize("name", ["semantic", "panoptic"])
def test_classes_of_the_original_image(shared: Path, name: str) -> None:
    """Equals detectron2's `sem_seg_postprocess` of the golden logits."""
    golden = shared / "golden/models"
    expected, inputs = np.load(golden / f"{name}_A.npz"), np.load(golden / "inputs_A.npz")
    batch = Batch(
        torch.zeros(2, 3, 256, 320, dtype=torch.uint8),
        torch.tensor([inputs[f"image.{i}"].shape[:2] for i in range(2)]).float(),
        no_targets(2),
        torch.arange(2),
        torch.arange(2),
        torch.from_numpy(np.stack([inputs[f"output_size.{i}"] for i in range(2)])),
    )
    logits = torch.from_numpy(expected["sem.logits_stride4"])
    for i in range(2):
        found = whole_image_classes(logits, batch, i)
        assert (found.numpy() == expected[f"sem_post.{i}.argmax"]).all()


def test_is_one_of_the_metrics() -> None:
    assert SemanticEvaluator in EVALUATORS
