"""Joined data sets against one file that is merged by hand."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from giantdet.config.checks import parse_giantdet
from giantdet.config.datasets import CocoDatasetConfig, CocoPanopticDatasetConfig, SemanticPngDatasetConfig
from giantdet.config.types import DataConfig
from giantdet.data.dataset import Dataset, open_dataset
from giantdet.data.samples import make_sample
from giantdet.data.transforms import draw_geometry
from giantdet.data.truth import ground_truth
from giantdet.errors import ConfigError, DataError
from giantdet.evaluation.coco import all_scores

CONFIG = DataConfig(size=(64, 64), short_side=64, max_objects=8, mask_frame=28)


def coco(file: Path, images: Path) -> CocoDatasetConfig:
    return CocoDatasetConfig(annotations=str(file), images=str(images))


@pytest.fixture
def files(demo_data: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Two files whose ids clash and whose category ids differ, and both merged with new ids."""
    one: dict[str, Any] = json.loads((demo_data / "val.json").read_text())
    two = copy.deepcopy(one)
    two["categories"] = [c | {"id": 90 - c["id"]} for c in reversed(one["categories"])]
    for record in two["annotations"]:
        record["category_id"] = 90 - record["category_id"]
    merged = copy.deepcopy(one)
    merged["images"] += [r | {"id": r["id"] + 1000} for r in one["images"]]
    merged["annotations"] += [
        r | {"id": r["id"] + 1000, "image_id": r["image_id"] + 1000} for r in one["annotations"]
    ]
    paths = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "merged.json"
    for path, content in zip(paths, (one, two, merged), strict=True):
        path.write_text(json.dumps(content))
    return paths


def results(dataset: Dataset) -> list[dict[str, Any]]:
    """Return objects, some with too large a box, some of another class; no two scores are equal."""
    numbers = dataset.classes.object_ids
    found = []
    for i in range(len(dataset)):
        objects = dataset.objects(i)
        for n, label in enumerate(objects.labels_N.tolist()):
            x0, y0, x1, y1 = objects.boxes_N4[n].tolist()
            box = [x0, y0, (x1 - x0) * (1 + n % 2 * 0.4), y1 - y0]
            category = numbers[(label + (n % 3 == 2)) % len(numbers)]
            found.append(
                {"image_id": int(dataset.image_ids[i]), "category_id": category, "bbox": box}
                | {"score": 1 / (1 + i + 100 * n)}
            )
    return found


def test_as_one_merged_file(
    files: tuple[Path, Path, Path], demo_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, merged = files
    images = demo_data / "val"
    with caplog.at_level(logging.WARNING, "giantdet"):
        joined = open_dataset((coco(one, images), coco(two, images)))
    whole = open_dataset(coco(merged, images))
    count = len(joined) // 2
    assert f"{count} image ids occur in an earlier part" in caplog.text
    assert "matched by name" in caplog.text
    assert len(set(joined.image_ids.tolist())) == len(joined) == len(whole)
    assert joined.summary() == whole.summary() and joined.classes == whole.classes
    for filter_empty in (True, False):
        chosen = joined.training_indices(filter_empty)
        np.testing.assert_array_equal(chosen, whole.training_indices(filter_empty))
    for i in range(len(whole)):
        height, width = whole.sizes_hw[i].tolist()
        geometry = draw_geometry(np.random.default_rng(i), (height, width), CONFIG, training=True)
        ours, theirs = (
            make_sample(d, i, i, CONFIG, geometry, frozenset(("boxes", "masks"))) for d in (joined, whole)
        )
        for name in ("image_HW3", "boxes_N4", "labels_N", "masks_NSS", "frames_N4"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    content = joined.instances()
    for key in ("images", "annotations"):
        ids = [record["id"] for record in content[key]]
        assert len(set(ids)) == len(ids) == len(whole.instances()[key])
    scores = [
        all_scores(ground_truth(d.annotations, d.instances()), results(d), False, 100)
        for d in (joined, whole)
    ]
    assert scores[0] == scores[1] and scores[0]


def test_a_list_of_one(files: tuple[Path, Path, Path], demo_data: Path) -> None:
    assert type(open_dataset((coco(files[0], demo_data / "val"),))).__name__ == "CocoDataset"


def test_a_name_that_is_missing(files: tuple[Path, Path, Path], demo_data: Path) -> None:
    content = json.loads(files[1].read_text())
    content["categories"][0]["name"] = "hexagon"
    files[1].write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"two\.json: category 'hexagon' .*one\.json"):
        open_dataset(tuple(coco(file, demo_data / "val") for file in files[:2]))


def maps(folder: Path, names: tuple[str, ...], labels: list[list[int]]) -> SemanticPngDatasetConfig:
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
        Image.fromarray(np.array(labels, np.uint8)).save(folder / kind / "a.png")
    return SemanticPngDatasetConfig(
        format="semantic_png", images=str(folder / "images"), labels=str(folder / "labels"), classes=names
    )


def test_semantic_maps(tmp_path: Path, files: tuple[Path, Path, Path], demo_data: Path) -> None:
    one = maps(tmp_path / "1", ("sky", "road", "car"), [[0, 1, 2, 255]])
    two = maps(tmp_path / "2", ("car", "sky"), [[0, 1, 1, 255]])
    joined = open_dataset((one, two))
    assert [np.asarray(joined.semantic_map(i)).tolist() for i in (0, 1)] == [
        [[0, 1, 2, 255]],
        [[2, 0, 0, 255]],
    ]
    joined.number_as(((0, "road"), (1, "car"), (2, "sky")))
    assert [np.asarray(joined.semantic_map(i)).tolist() for i in (0, 1)] == [
        [[2, 0, 1, 255]],
        [[1, 2, 2, 255]],
    ]
    with pytest.raises(DataError, match=r"one\.json has objects and .*labels has none"):
        open_dataset((one, coco(files[0], demo_data / "val")))


@pytest.mark.parametrize(
    ("train", "text"),
    [
        ("coco", 'giantdet.data.train must be an object or a list of objects, got "coco"'),
        ([], "giantdet.data.train must be a list of at least 1, got []"),
        ([{"annotations": "a", "images": "b"}, 3], "giantdet.data.train.1 must be an object, got 3"),
        ([{"images": "b"}], "giantdet.data.train.0.annotations is missing"),
        ([{"format": "cooc"}], 'giantdet.data.train.0.format must be one of "coco"'),
        ([{"annotations": "a", "images": 3}], "giantdet.data.train.0.images must be a string, got 3"),
        (
            [{"annotations": "a", "images": "b", "ann_file": "c"}],
            "unknown key giantdet.data.train.0.ann_file",
        ),
        (
            [{"annotations": "a", "images": "b", "segments": "c"}],
            "unknown key giantdet.data.train.0.segments: it is a key of coco_panoptic",
        ),
    ],
)
def test_errors_of_lists(train: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_giantdet({"data": {"train": train}, "train": {"steps": 1}})
    assert str(caught.value).startswith(text)


def test_panoptic_categories(demo_data: Path, tmp_path: Path) -> None:
    found = sorted(demo_data.glob("*val*panoptic*.json")) + sorted(demo_data.glob("panoptic*val*.json"))
    content = json.loads(found[0].read_text())
    for record in content["categories"]:
        record["id"] += 50
    for record in content["annotations"]:
        for segment in record["segments_info"]:
            segment["category_id"] += 50
    (tmp_path / "other.json").write_text(json.dumps(content))
    keys = {
        "format": "coco_panoptic",
        "images": str(demo_data / "val"),
        "segments": str(found[0].with_suffix("")),
    }
    one, two = (
        CocoPanopticDatasetConfig.model_validate(keys | {"annotations": str(file)})
        for file in (found[0], tmp_path / "other.json")
    )
    joined, alone = open_dataset((one, two)), open_dataset(one)
    count = len(alone)
    for i in range(count):
        known, first, second = alone.panoptic_map(i), joined.panoptic_map(i), joined.panoptic_map(count + i)
        assert known is not None and first is not None and second is not None
        assert known.segments == first.segments == second.segments
        np.testing.assert_array_equal(alone.semantic_map(i), joined.semantic_map(count + i))
        np.testing.assert_array_equal(alone.objects(i).labels_N, joined.objects(count + i).labels_N)
        assert len(alone.objects(i)) == 0 or alone.objects(i).rle(0) == joined.objects(count + i).rle(0)
    assert len(joined.instances()["annotations"]) == 2 * len(alone.instances()["annotations"])
