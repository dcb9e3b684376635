"""LVIS scores against lvis-api, whose numbers for random sets are stored here."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util
from tiny import MODEL

from giantdet.architectures import build_model
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.config.checks import parse_giantdet
from giantdet.config.datasets import LvisDatasetConfig
from giantdet.config.types import Backend, DataConfig
from giantdet.data import packed
from giantdet.data.coco import CocoDataset
from giantdet.data.dataset import CHECKS, open_dataset
from giantdet.data.lvis import LvisDataset
from giantdet.data.truth import ground_truth
from giantdet.engine.evaluate import evaluate, warn_of_limits
from giantdet.errors import ConfigError, DataError
from giantdet.evaluation import metrics_of
from giantdet.evaluation.backends import BACKENDS
from giantdet.evaluation.coco import CocoEvaluator, all_scores
from giantdet.evaluation.coco_results import CocoResults
from giantdet.evaluation.lvis import LvisEvaluator, lvis_scores
from giantdet.evaluation.semantic import SemanticEvaluator

CATEGORIES = {3: "r", 17: "r", 5: "c", 90: "c", 8: "f", 41: "f", 60: "r"}
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR", "ARs", "ARm", "ARl")
LVIS_API = {
    (1, "bbox", 300): (
        0.179168,
        0.34601,
        0.157925,
        0.255649,
        0.106542,
        1.0,
        0.073544,
        0.18467,
        0.27929,
        0.393056,
        0.419048,
        0.268056,
        1.0,
    ),
    (1, "bbox", 15): (
        0.128468,
        0.276428,
        0.107343,
        0.17692,
        0.084182,
        0.1,
        0.045545,
        0.146706,
        0.193152,
        0.231944,
        0.249603,
        0.172222,
        0.1,
    ),
    (1, "segm", 300): (
        0.107221,
        0.253648,
        0.118527,
        0.155451,
        0.046788,
        0.7,
        0.060468,
        0.071422,
        0.189773,
        0.2475,
        0.270635,
        0.120833,
        0.7,
    ),
    (1, "segm", 15): (
        0.071473,
        0.193069,
        0.064356,
        0.10541,
        0.034773,
        0.0,
        0.034653,
        0.05361,
        0.126155,
        0.1325,
        0.152579,
        0.073611,
        0.0,
    ),
    (8, "bbox", 300): (
        0.215566,
        0.323937,
        0.189448,
        0.233405,
        0.206353,
        0.25,
        0.226182,
        0.314671,
        0.105846,
        0.444901,
        0.418849,
        0.3375,
        0.5,
    ),
    (8, "bbox", 15): (
        0.163179,
        0.263264,
        0.141155,
        0.175621,
        0.148047,
        0.0,
        0.189486,
        0.19644,
        0.103609,
        0.314087,
        0.299702,
        0.2125,
        0.0,
    ),
    (8, "segm", 300): (
        0.13634,
        0.292449,
        0.162569,
        0.136998,
        0.142162,
        0.1,
        0.141325,
        0.21212,
        0.055576,
        0.255853,
        0.233829,
        0.225,
        0.15,
    ),
    (8, "segm", 15): (
        0.098016,
        0.228167,
        0.105175,
        0.089576,
        0.098762,
        0.05,
        0.116997,
        0.122525,
        0.054525,
        0.188512,
        0.16498,
        0.145833,
        0.05,
    ),
}
"""Results of lvis-api 0.5.3 for `random_set`, by its seed, the kind and the limit of detections per image.

`LVISEval(LVIS, LVISResults(LVIS, results, limit), kind)`; for masks without the boxes of results.
"""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param != "pycocotools":
        pytest.importorskip(request.param)
    return request.param


def blob(
    rng: np.random.Generator, box: list[float], size_hw: tuple[int, int], may_be_empty: bool = True
) -> Any:
    """A noisy mask in a box, as compressed RLE; sometimes empty."""
    mask = np.zeros(size_hw, np.uint8)
    x0, y0, x1, y1 = (max(int(v), 0) for v in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    inside = mask[y0:y1, x0:x1]
    inside[:] = rng.random(inside.shape) < 0.9 * (not may_be_empty or rng.random() > 0.08)
    encoded = mask_util.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def random_set(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Annotations and results with everything that LVIS's rules distinguish.

    Categories that are present, absent, not exhaustively annotated and unknown, in objects and results of all
    sizes, equal scores, empty masks, images with many results or none, a category without any object.
    """
    rng = np.random.default_rng(seed)
    numbers = [3, 17, 5, 90, 8, 41]
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number in (9, 2, 44, 7, 100, 31, 12, 15):
        size = tuple(int(v) for v in rng.integers(60, 320, 2))
        state = {category: int(rng.integers(4)) for category in numbers}  # present, open, absent, unknown
        for category in numbers:
            for _ in range(int(rng.integers(1, 4)) if state[category] < 2 else 0):
                x, y = rng.random() * (size[1] - 12), rng.random() * (size[0] - 12)
                w, h = 4 + rng.random() * (size[1] - x - 4), 4 + rng.random() * (size[0] - y - 4)
                if rng.random() < 0.4:
                    w, h = min(w, 20.0), min(h, 20.0)
                box = [x, y, w, h]
                mask = blob(rng, box, size, may_be_empty=False)
                area = float(mask_util.area(mask)) if rng.random() < 0.9 else 1024.0
                keys = {"id": len(objects) + 1, "image_id": number, "category_id": category, "bbox": box}
                objects.append(keys | {"area": max(area, 1.0), "segmentation": mask})
                for _ in range(int(rng.integers(0, 4))):
                    near = [v + d for v, d in zip(box, rng.random(4) * 0.3 * min(w, h), strict=True)]
                    found = near if rng.random() < 0.8 else box
                    wrong = numbers[int(rng.integers(6))]
                    results.append(
                        {"image_id": number, "category_id": category if rng.random() < 0.85 else wrong}
                        | {
                            "bbox": found,
                            "score": round(rng.random(), 1),
                            "segmentation": blob(rng, found, size),
                        }
                    )
        for _ in range(int(rng.integers(0, 40))):
            box = [*(rng.random(2) * 50).tolist(), *(rng.random(2) * 120).tolist()]
            keys = {"image_id": number, "category_id": [*numbers, 60][int(rng.integers(7))], "bbox": box}
            results.append(keys | {"score": round(rng.random(), 2), "segmentation": blob(rng, box, size)})
        images.append(
            {"id": number, "height": size[0], "width": size[1]}
            | {"coco_url": f"http://images.cocodataset.org/val2017/{number:012d}.jpg"}
            | {"neg_category_ids": [category for category in numbers if state[category] == 2]}
            | {"not_exhaustive_category_ids": [category for category in numbers if state[category] == 1]}
        )
    named = [{"id": i, "name": f"class_{i}", "frequency": f} for i, f in CATEGORIES.items()]
    order = rng.permutation(len(results))
    return {"images": images, "annotations": objects, "categories": named}, [results[i] for i in order]


def scored(content: Any, results: Any, kind: Any, limit: int = 300, backend: Backend = "auto") -> Any:
    frequencies = {record["id"]: record["frequency"] for record in content["categories"]}
    truth = ground_truth("a.json", content)
    return lvis_scores(truth, frequencies, CocoResults.of(results), kind, limit, backend)


@pytest.mark.parametrize(("seed", "kind", "limit"), LVIS_API)
def test_all_numbers_equal_lvis_api(seed: int, kind: Any, limit: int, backend: Backend) -> None:
    found = scored(*random_set(seed), kind, limit, backend)
    by_class = found.pop("per_class")
    assert tuple(found) == tuple(f"AR{limit}" if name == "AR" else name for name in NAMES)
    assert list(found.values()) == pytest.approx(LVIS_API[seed, kind, limit], abs=6e-7)
    assert by_class["class_60"] is None, "the class has no object"
    assert np.mean([v for v in by_class.values() if v is not None]) == pytest.approx(found["AP"])


def hand_made() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An image with a cat, no dog, some of its birds, and unknown fish; all objects are found."""
    names = {1: ("cat", "f"), 2: ("dog", "c"), 3: ("bird", "r"), 4: ("fish", "r")}
    url = "http://images.cocodataset.org/train2017/000000000007.jpg"
    image = {"id": 7, "width": 100, "height": 80, "coco_url": url}
    image |= {"neg_category_ids": [2], "not_exhaustive_category_ids": [3]}
    other = {"id": 8, "width": 100, "height": 80, "coco_url": url.replace("train", "val").replace("7.", "8.")}
    other |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    boxes = [(7, 1, [10, 10, 30, 20]), (7, 3, [50, 10, 30, 20]), (8, 2, [5, 5, 40, 40])]
    objects = [
        {"id": n, "image_id": image_id, "category_id": category, "bbox": box, "area": box[2] * box[3]}
        for n, (image_id, category, box) in enumerate(boxes, 1)
    ]
    categories = [{"id": i, "name": name, "frequency": f} for i, (name, f) in names.items()]
    results = [{key: o[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5} for o in objects]
    return {"images": [image, other], "annotations": objects, "categories": categories}, results


@pytest.mark.parametrize(
    ("category", "ap"),
    [
        pytest.param(1, {"cat": 0.5}, id="of a present category"),
        pytest.param(2, {"dog": 0.5}, id="of an absent category"),
        pytest.param(3, {}, id="of a category that is not exhaustively annotated"),
        pytest.param(4, {}, id="of an unknown category"),
    ],
)
def test_a_higher_scored_false_positive(category: int, ap: dict[str, float], backend: Backend) -> None:
    content, results = hand_made()
    wrong = {"image_id": 7, "category_id": category, "bbox": [60, 50, 20, 20], "score": 0.9}
    found = scored(content, [*results, wrong], "bbox", backend=backend)
    expected = {"cat": 1.0, "dog": 1.0, "bird": 1.0} | ap
    assert found["per_class"] == {name: pytest.approx(v) for name, v in expected.items()} | {"fish": None}
    assert [found[f"AP{group}"] for group in "fcr"] == [pytest.approx(v) for v in expected.values()]


def test_the_limit_is_over_all_classes_of_an_image(backend: Backend) -> None:
    content, results = hand_made()
    fish = [{"image_id": 7, "category_id": 4, "bbox": [1, 1, 9, 9], "score": 0.8}] * 2
    assert scored(content, [*results, *fish], "bbox", 4, backend)["AP"] == pytest.approx(1.0)
    found = scored(content, [*results, *fish], "bbox", 3, backend)
    assert found["AR3"] == pytest.approx(2 / 3), "the first of equal scores counts; the bird is fourth"
    assert found["per_class"]["bird"] == 0


@pytest.fixture
def lvis_data(demo_data: Path, tmp_path: Path) -> LvisDatasetConfig:
    """The demo set's validation images in LVIS's layout: in folders of COCO's splits, named by a URL."""
    content = json.loads((demo_data / "val.json").read_text())
    for n, record in enumerate(content["images"]):
        split = ("train2017", "val2017")[n % 2]
        (tmp_path / split).mkdir(exist_ok=True)
        name = f"{n % 3}.jpg"  # the splits have images of the same name
        (tmp_path / split / name).symlink_to(demo_data / "val" / record.pop("file_name"))
        record |= {"coco_url": f"http://images.cocodataset.org/{split}/{name}"}
        record |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    for record, frequency in zip(content["categories"], "rcff", strict=False):
        record["frequency"] = frequency
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    return LvisDatasetConfig(format="lvis", annotations=str(tmp_path / "lvis.json"), images=str(tmp_path))


def test_images_are_read_from_both_of_cocos_folders(
    lvis_data: LvisDatasetConfig, demo_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, plain = open_dataset(lvis_data), CocoDataset(demo_data / "val.json", demo_data / "val")
    assert isinstance(dataset, LvisDataset) and dataset.path(1).parent.name == "val2017"
    for i in range(len(plain)):
        assert np.array_equal(dataset.read_image(i), plain.read_image(i))
    assert not caplog.records and not CHECKS["lvis"](lvis_data).has_errors
    assert metrics_of(("box", "semantic"), dataset) == [LvisEvaluator, SemanticEvaluator]
    assert metrics_of(("mask",), plain) == [CocoEvaluator]
    assert CocoDataset(lvis_data.annotations, lvis_data.images).noted["lists of LVIS"] == 5
    assert '"format": "lvis" reads it' in caplog.text


def test_the_cache_distinguishes_formats(
    lvis_data: LvisDatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIANTDET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "LEAST_BYTES", 1)
    for _ in range(2):  # written, then found
        assert open_dataset(lvis_data).path(1) == tmp_path / "val2017/1.jpg"
        assert CocoDataset(lvis_data.annotations, lvis_data.images).path(1) == tmp_path / "1.jpg"
    assert len(list((tmp_path / "cache").glob("*.pack"))) == 2


def test_a_model_is_evaluated_by_lvis_rules(lvis_data: LvisDatasetConfig, tmp_path: Path) -> None:
    """Every class is annotated exhaustively, and detections of other classes do not count."""
    dataset = open_dataset(lvis_data)
    config = MaskRcnnConfig.model_validate({**MODEL, "num_classes": len(dataset.classes.objects)})
    torch.manual_seed(0)
    found = evaluate(
        build_model(config, (64, 64)).eval(),
        dataset,
        DataConfig(size=(64, 64), short_side=64, workers=0),
        2,
        torch.device("cpu"),
        tasks=("box", "mask"),
        model_config=config,
        classes=dataset.classes,
        results=tmp_path / "results.json",
    )
    results = CocoResults.of(json.loads((tmp_path / "results.json").read_text()))
    assert found.scores == LvisEvaluator.score(dataset, results, masks=True)
    assert set(found.scores) == {"box", "mask"} and found.primary == found.scores["mask"]["AP"]
    assert "APr" in found.table and "AP by class" not in found.table
    with_negatives = json.loads(Path(lvis_data.annotations).read_text())
    for record in with_negatives["images"]:
        record["neg_category_ids"] = list(dataset.classes.object_ids)
    Path(lvis_data.annotations).write_text(json.dumps(with_negatives))
    by_lvis = LvisEvaluator.score(open_dataset(lvis_data), results, masks=False)["box"]
    truth = ground_truth("a.json", with_negatives)
    assert by_lvis["per_class"] == all_scores(truth, results, False, 300)["box"]["per_class"], "all annotated"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["images"][1].pop("neg_category_ids"), "has no list neg_category_ids of category ids"),
        (
            lambda c: c["images"][1].update(not_exhaustive_category_ids="3"),
            "has no list not_exhaustive_category_ids of category ids",
        ),
        (lambda c: c["categories"][0].pop("frequency"), 'has no frequency of "r", "c" or "f"'),
    ],
)
def test_a_file_of_another_format_is_refused(lvis_data: LvisDatasetConfig, change: Any, words: str) -> None:
    content = json.loads(Path(lvis_data.annotations).read_text())
    change(content)
    Path(lvis_data.annotations).write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        open_dataset(lvis_data)
    with pytest.raises(DataError, match=words):
        CHECKS["lvis"](lvis_data)


def test_lvis_cannot_be_joined(lvis_data: LvisDatasetConfig) -> None:
    both = [lvis_data.model_dump(), {"annotations": "a.json", "images": "b"}]
    block = {"train": {"steps": 1}, "data": {"train": both, "val": both[0]}}
    parse_giantdet(block)
    with pytest.raises(ConfigError, match=r"giantdet\.data\.val has .* for one data set: give it alone"):
        parse_giantdet(block | {"data": {"val": both}})


def test_fewer_detections_than_lvis_scores_give_a_warning(
    lvis_data: LvisDatasetConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        warn_of_limits(open_dataset(lvis_data), MaskRcnnConfig(), None)
    assert "lvis scores is 300, but the model predicts at most 100" in caplog.text
