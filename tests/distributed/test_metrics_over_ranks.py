"""The metrics of every architecture on 2 and 4 ranks equal those of one process, with an unreadable image.

An image that cannot be read counts as missed in every metric, and one whose map cannot be read is not scored.
The expected numbers come from the results of the intact set, without those of that image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import worker_metrics
from numpy.typing import NDArray
from PIL import Image
from pq import quality
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import FORMATS, MODELS, launch_ok

from giantdet.data.demo import make_demo
from giantdet.evaluation.semantic import SEMANTIC_NUMBERS

WORLDS = (1, 2, 4)
IMAGES, BAD = 7, 4  # number of images, and the index of the unreadable one
STRIDE = 16
MAPS_ONLY = [kind for kind in MODELS if FORMATS[kind] == "semantic_png"]
CASES: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in MODELS},
    **{f"{kind}_windows": {"kind": kind, "window_stride": STRIDE, "batch_size": 3} for kind in MAPS_ONLY},
}
# Each case runs on the intact set, on one with a broken image, and on one with a broken map.
PAIRS = [(name, data) for name in CASES for data in ("whole", "broken")]
PAIRS += [(name, "unlabelled") for name, case in CASES.items() if FORMATS[case["kind"]] != "coco"]
MAPS = [name for name, case in CASES.items() if case["kind"] in MAPS_ONLY]
Results = dict[tuple[int, str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics")
    for name in ("whole", "broken", "unlabelled"):
        make_demo(folder / name, train_images=1, val_images=IMAGES, size=64)
    image = next((folder / "broken/val").glob(f"{BAD:06d}.*"))
    image.write_bytes(image.read_bytes()[:100])
    (folder / f"unlabelled/panoptic_val/{BAD:06d}.png").unlink()
    labels = folder / f"unlabelled/semantic_val/{BAD:06d}.png"
    labels.write_bytes(labels.read_bytes()[:45])
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """The results of each world size in each case and data set."""
    cases = {f"{name}_{data}": {**CASES[name], "data": str(folder / data)} for name, data in PAIRS}
    found = {}
    for world in WORLDS:
        out = folder / str(world)
        out.mkdir()
        launch_ok(Path(worker_metrics.__file__), world, out, json.dumps(cases))
        for name, data in PAIRS:
            found[world, name, data] = torch.load(out / f"{name}_{data}.pt")
    return found


def numbers(scores: Any, path: str = "") -> dict[str, float]:
    """Return all numbers of nested scores by path."""
    if not isinstance(scores, dict):
        return {path: scores}
    return {
        key: value for name, part in scores.items() for key, value in numbers(part, f"{path}/{name}").items()
    }


@pytest.mark.parametrize(("name", "data"), PAIRS)
def test_ranks_score_as_one_process(results: Results, name: str, data: str) -> None:
    """Scores are equal bit for bit, except PQ, whose IoUs are summed in another order: to 1e-12."""
    expected = results[1, name, data]
    for world in WORLDS[1:]:
        found = results[world, name, data]
        mine, theirs = numbers(found["scores"]), numbers(expected["scores"])
        assert mine.keys() == theirs.keys() and len(mine) > 6
        for key, value in theirs.items():
            tolerance = 1e-12 if "/panoptic/" in key else 0.0
            assert mine[key] == pytest.approx(value, rel=0, abs=tolerance, nan_ok=True), (world, key)
        assert found["table"] == expected["table"]
        assert found["primary"] == pytest.approx(expected["primary"], rel=0, abs=1e-12)
    assert 0.01 < expected["primary"] < 0.9, "nothing is found, or everything: the test is vacuous"


@pytest.mark.parametrize("name", CASES)
def test_trackers_get_pictures_of_the_same_images(results: Results, folder: Path, name: str) -> None:
    """Every second of the seven images; the fifth cannot be read in the broken set."""
    expected = [f"giantdet/val/{number}_{image:06d}" for number, image in enumerate((0, 2, 4, 6), 1)]
    for world in WORLDS:
        whole, broken = results[world, name, "whole"], results[world, name, "broken"]
        assert list(whole["pictures"]) == expected
        assert list(broken["pictures"]) == [expected[0], expected[1], expected[3]]
        for key, picture in results[1, name, "whole"]["pictures"].items():
            assert torch.equal(whole["pictures"][key], picture), (world, key)
        assert whole["shown"] == results[1, name, "whole"]["shown"]


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind not in MAPS])
def test_pictures_have_the_detections_that_are_scored(results: Results, folder: Path, kind: str) -> None:
    shown = results[2, kind, "whole"]["shown"]
    records = json.loads((folder / f"2/{kind}_whole/results.json").read_text())
    for image_id, found in shown.items():
        theirs = sorted(
            (r["score"], *r["bbox"]) for r in records if r["image_id"] == image_id and r["score"] >= 0.5
        )
        assert np.array(sorted(found)) == pytest.approx(np.array(theirs), abs=1e-5)
    assert sum(map(len, shown.values())) > 5


def test_the_unreadable_image_changes_the_scores(results: Results) -> None:
    for name in CASES:
        for task, scores in results[1, name, "whole"]["scores"].items():
            assert numbers(results[1, name, "broken"]["scores"][task]) != numbers(scores), (name, task)


@pytest.mark.parametrize(("kind", "data"), [(n, d) for n, d in PAIRS if n not in MAPS and d != "whole"])
def test_missed_objects(results: Results, folder: Path, kind: str, data: str) -> None:
    """Scores equal pycocotools' on the detections of the intact set without those of the image.

    Without its map the true objects of the image are unknown, and therefore left out.
    """
    bad = 10**6 + BAD + 1
    content = json.loads((folder / "whole/val.json").read_text())
    if data == "unlabelled":
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != bad]
    truth = COCO()
    truth.dataset = content
    truth.createIndex()
    scores = {task: s for task, s in results[1, kind, data]["scores"].items() if task in IOU_TYPES}
    assert "box" in scores
    detections = json.loads((folder / f"1/{kind}_whole/results.json").read_text())
    kept = [record for record in detections if record["image_id"] != bad]
    assert len(kept) < len(detections)
    for task, found in scores.items():
        own = [{k: v for k, v in record.items() if task == "box" or k != "bbox"} for record in kept]
        judge = COCOeval(truth, truth.loadRes(own), IOU_TYPES[task])
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        assert [found[key] for key in ("AP", "AP50", "AR100")] == judge.stats[[0, 1, 8]].tolist()


IOU_TYPES = {"box": "bbox", "mask": "segm"}


@pytest.mark.parametrize("kind", [kind for kind in MODELS if FORMATS[kind] == "coco_panoptic"])
def test_missed_segments(results: Results, folder: Path, kind: str) -> None:
    files = folder / "whole/panoptic_val.json", folder / f"1/{kind}_whole/results_panoptic.json"
    assert len(json.loads(files[1].read_text())["annotations"]) == IMAGES
    bad = 10**6 + BAD + 1
    for data, left_out in (("whole", {}), ("broken", {"without": bad}), ("unlabelled", {"skip": bad})):
        scores = results[1, kind, data]["scores"]["panoptic"]
        expected = quality(*files, **left_out)
        assert {key: scores[key] for key in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if FORMATS[case["kind"]] != "coco"])
def test_missed_pixels(results: Results, folder: Path, name: str) -> None:
    """The confusion matrix is that of the intact set, with the image's pixels unassigned or not counted."""
    whole, broken, unlabelled = (
        np.array(json.loads((folder / f"1/{name}_{data}/results_semantic.json").read_text())["confusion"])
        for data in ("whole", "broken", "unlabelled")
    )
    truth = true_map(results, folder, name)
    lost = np.bincount(truth[truth != 255], minlength=len(whole))
    assert whole[:, -1].sum() == 0 and broken[:, -1].tolist() == lost.tolist()
    assert (whole.sum(1) == broken.sum(1)).all() and (broken[:, :-1] <= whole[:, :-1]).all()
    assert (unlabelled[:, :-1] == broken[:, :-1]).all() and not unlabelled[:, -1].any()
    hits, true, found = broken.diagonal(), broken.sum(1), broken.sum(0)[:-1]
    occurs = true > 0
    expected = {
        "mIoU": (hits[occurs] / (true + found - hits)[occurs]).mean(),
        "mACC": (hits[occurs] / true[occurs]).mean(),
        "pACC": hits.sum() / broken.sum(),
    }
    scores = results[1, name, "broken"]["scores"]["semantic"]
    assert {key: scores[key] for key in SEMANTIC_NUMBERS} == pytest.approx(expected, rel=1e-12)


def true_map(results: Results, folder: Path, name: str) -> NDArray[np.uint8]:
    """The image's true classes from the label file; in panoptic data all objects are one class."""
    labels = np.array(Image.open(folder / f"whole/semantic_val/{BAD:06d}.png"))
    if FORMATS[CASES[name]["kind"]] == "semantic_png":
        return labels
    table = np.full(256, 255, np.uint8)
    table[:6] = (0, 0, 0, 0, 1, 2)
    return table[labels]
