"""The metrics of every architecture on 2 and 4 real ranks against one process, an unreadable image included.

An image that cannot be read counts as missed in every metric; that is held to numbers made from the results
of the intact set, without those of that image.
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
IMAGES, BAD = 7, 4  # images, and the index of the one that cannot be read
STRIDE = 16
MAPS_ONLY = [kind for kind in MODELS if FORMATS[kind] == "semantic_png"]
CASES: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in MODELS},
    **{f"{kind}_windows": {"kind": kind, "window_stride": STRIDE, "batch_size": 3} for kind in MAPS_ONLY},
}
Results = dict[tuple[int, str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics")
    for name in ("whole", "broken"):
        make_demo(folder / name, train_images=1, val_images=IMAGES, size=64)
    image = next((folder / "broken/val").glob(f"{BAD:06d}.*"))
    image.write_bytes(image.read_bytes()[:100])
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """What each world found in each case and set."""
    cases = {
        f"{name}_{data}": {**case, "data": str(folder / data)}
        for name, case in CASES.items()
        for data in ("whole", "broken")
    }
    found = {}
    for world in WORLDS:
        out = folder / str(world)
        out.mkdir()
        launch_ok(Path(worker_metrics.__file__), world, out, json.dumps(cases))
        for name in CASES:
            for data in ("whole", "broken"):
                found[world, name, data] = torch.load(out / f"{name}_{data}.pt")
    return found


def numbers(scores: Any, path: str = "") -> dict[str, float]:
    """All numbers of nested scores."""
    if not isinstance(scores, dict):
        return {path: scores}
    return {
        key: value for name, part in scores.items() for key, value in numbers(part, f"{path}/{name}").items()
    }


@pytest.mark.parametrize("data", ["whole", "broken"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_score_as_one_process(results: Results, name: str, data: str) -> None:
    """Bit for bit; PQ, whose IoUs are summed in another order, to 1e-12."""
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
    assert 0.01 < expected["primary"] < 0.9, "nothing is found, or everything: the test shows nothing"


def test_the_unreadable_image_matters(results: Results) -> None:
    for name in CASES:
        for task, scores in results[1, name, "whole"]["scores"].items():
            assert numbers(results[1, name, "broken"]["scores"][task]) != numbers(scores), (name, task)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if FORMATS[kind] != "semantic_png"])
def test_missed_objects(results: Results, folder: Path, kind: str) -> None:
    """pycocotools on the detections of the intact set without those of the image."""
    truth = COCO(str(folder / "whole/val.json"))
    bad = 10**6 + BAD + 1
    detections = json.loads((folder / f"1/{kind}_whole/results.json").read_text())
    kept = [record for record in detections if record["image_id"] != bad]
    assert len(kept) < len(detections)
    scores = results[1, kind, "broken"]["scores"]
    for task, iou_type in (("box", "bbox"), ("mask", "segm")):
        if task not in scores:
            continue
        own = [{k: v for k, v in record.items() if task == "box" or k != "bbox"} for record in kept]
        judge = COCOeval(truth, truth.loadRes(own), iou_type)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        assert [scores[task][key] for key in ("AP", "AP50", "AR100")] == judge.stats[[0, 1, 8]].tolist()


@pytest.mark.parametrize("kind", [kind for kind in MODELS if FORMATS[kind] == "coco_panoptic"])
def test_missed_segments(results: Results, folder: Path, kind: str) -> None:
    files = folder / "whole/panoptic_val.json", folder / f"1/{kind}_whole/results_panoptic.json"
    for data, missing in (("whole", None), ("broken", 10**6 + BAD + 1)):
        scores = results[1, kind, data]["scores"]["panoptic"]
        expected = quality(*files, missing)
        assert {key: scores[key] for key in expected} == pytest.approx(expected, rel=1e-12)
        assert len(json.loads(files[1].read_text())["annotations"]) == IMAGES


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if FORMATS[case["kind"]] != "coco"])
def test_missed_pixels(results: Results, folder: Path, name: str) -> None:
    """The confusion matrix is that of the intact set, and the image's pixels are of no class."""
    whole, broken = (
        np.array(json.loads((folder / f"1/{name}_{data}/results_semantic.json").read_text())["confusion"])
        for data in ("whole", "broken")
    )
    truth = true_map(results, folder, name)
    lost = np.bincount(truth[truth != 255], minlength=len(whole))
    assert whole[:, -1].sum() == 0 and broken[:, -1].tolist() == lost.tolist()
    assert (whole.sum(1) == broken.sum(1)).all() and (broken[:, :-1] <= whole[:, :-1]).all()
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
    """The image's true classes, read from the label file: those of objects are one class in panoptic data."""
    labels = np.array(Image.open(folder / f"whole/semantic_val/{BAD:06d}.png"))
    if FORMATS[CASES[name]["kind"]] == "semantic_png":
        return labels
    table = np.full(256, 255, np.uint8)
    table[:6] = (0, 0, 0, 0, 1, 2)
    return table[labels]
