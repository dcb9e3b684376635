"""Several data sets as one, against a single file that was merged by hand."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_run

from giantdet.config.datasets import CocoDatasetConfig, CocoPanopticDatasetConfig, SemanticPngDatasetConfig
from giantdet.config.load import parse_run
from giantdet.config.resolve import check_data, describe
from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.dataset import Dataset
from giantdet.data.formats import open_dataset
from giantdet.data.joined import JoinedDataset
from giantdet.data.loader import train_loader
from giantdet.data.truth import ground_truth
from giantdet.errors import ConfigError, DataError
from giantdet.evaluation.coco import all_scores

OTHER_IDS = {1: 20, 3: 12, 4: 14, 7: 17}  # of the same names, in another order


def halves(demo_data: Path, folder: Path, ids: dict[int, int]) -> tuple[Path, Path, Path]:
    """Two files that use the same ids, the second with other category ids, and a third with all of it."""
    whole: dict[str, Any] = json.loads((demo_data / "train.json").read_text())
    images = whole["images"]
    files = []
    for n, chosen in enumerate((images[: len(images) // 2], images[len(images) // 2 :])):
        renumbered = {image["id"]: k for k, image in enumerate(chosen, 1)}
        part = {
            "images": [image | {"id": renumbered[image["id"]]} for image in chosen],
            "annotations": [
                record | {"id": k, "image_id": renumbered[record["image_id"]]}
                for k, record in enumerate(r for r in whole["annotations"] if r["image_id"] in renumbered)
            ],
            "categories": copy.deepcopy(whole["categories"]),
        }
        if n:
            for record in part["categories"]:
                record["id"] = ids[record["id"]]
            for record in part["annotations"]:
                record["category_id"] = ids[record["category_id"]]
        files.append(folder / f"part{n}.json")
        files[-1].write_text(json.dumps(part))
    number = {image["id"]: k for k, image in enumerate(images, 1)}
    merged = {
        "images": [image | {"id": number[image["id"]]} for image in images],
        "annotations": [r | {"image_id": number[r["image_id"]]} for r in whole["annotations"]],
        "categories": whole["categories"],
    }
    (folder / "whole.json").write_text(json.dumps(merged))
    return files[0], files[1], folder / "whole.json"


@pytest.fixture
def pair(demo_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> tuple[Dataset, Dataset]:
    one, other, whole = halves(demo_data, tmp_path, OTHER_IDS)
    images = demo_data / "train"
    with caplog.at_level(logging.WARNING, "giantdet"):
        joined = JoinedDataset([CocoDataset(one, images), CocoDataset(other, images)])
    assert "part0.json, and are matched by name: circle 20 for 1, rectangle 12 for 3" in caplog.text
    assert "6 images have the id of another one, so all are numbered from 1" in caplog.text
    return joined, CocoDataset(whole, images)


def test_it_equals_one_file(pair: tuple[Dataset, Dataset], demo_data: Path) -> None:
    joined, whole = pair
    assert joined.classes == whole.classes and len(joined) == len(whole) == 12
    assert np.array_equal(joined.image_ids, whole.image_ids)
    assert np.array_equal(joined.sizes_hw, whole.sizes_hw)
    assert joined.summary() == whole.summary()
    for filtered in (False, True):
        assert np.array_equal(joined.training_indices(filtered), whole.training_indices(filtered))
    for i in range(len(whole)):
        one, other = joined.objects(i), whole.objects(i)
        assert joined.path(i) == whole.path(i) and one.size_hw == other.size_hw
        assert np.array_equal(one.boxes_N4, other.boxes_N4) and np.array_equal(one.labels_N, other.labels_N)
        assert [one.rle(n) for n in range(len(one))] == [other.rle(n) for n in range(len(other))]


def test_the_loader_gives_the_same_batches(pair: tuple[Dataset, Dataset]) -> None:
    config = DataConfig(size=(64, 64), short_side=64, max_objects=16, workers=0)
    streams = [train_loader(dataset, config, 2, 0, 1, seed=3) for dataset in pair]
    for _ in range(8):
        one, other = (next(stream) for stream in streams)
        assert (one.images_B3HW == other.images_B3HW).all()
        assert (one.targets.labels_BM == other.targets.labels_BM).all()
        assert (one.targets.boxes_BM4 == other.targets.boxes_BM4).all()
        assert (one.image_ids_B == other.image_ids_B).all()


def test_scores_are_those_of_one_file(pair: tuple[Dataset, Dataset]) -> None:
    generator = np.random.default_rng(0)
    results = []
    for record in pair[1].instances()["annotations"]:
        box = (np.array(record["bbox"]) + generator.normal(0, 2, 4)).clip(1).tolist()
        about = {"image_id": record["image_id"], "category_id": record["category_id"]}
        results.append(about | {"bbox": box, "score": float(generator.random())})
    truths = [ground_truth(dataset.annotations, dataset.instances()) for dataset in pair]
    one, other = (all_scores(truth, copy.deepcopy(results), masks=False) for truth in truths)
    assert one == other and 0.1 < float(other["box"]["AP"] or 0) < 1.0


def test_a_name_that_the_first_does_not_have(demo_data: Path, tmp_path: Path) -> None:
    one, other, _ = halves(demo_data, tmp_path, OTHER_IDS)
    content = json.loads(other.read_text())
    content["categories"][0]["name"] = "disc"
    other.write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"part1.json: category 'disc' \(id 20\) .*the classes of .*part0.json: "
    ):
        JoinedDataset([CocoDataset(file, demo_data / "train") for file in (one, other)])


def test_maps_and_segments_of_two_folders(demo_data: Path) -> None:
    panoptic = [
        CocoPanopticDatasetConfig(
            format="coco_panoptic",
            annotations=str(demo_data / f"panoptic_{split}.json"),
            images=str(demo_data / split),
        )
        for split in ("train", "val")
    ]
    semantic = [
        SemanticPngDatasetConfig(
            format="semantic_png",
            images=str(demo_data / split),
            labels=str(demo_data / f"semantic_{split}"),
            classes=str(demo_data / "semantic_classes.json"),
        )
        for split in ("train", "val")
    ]
    for sections in (panoptic, semantic):
        parts = [open_dataset(section) for section in sections]
        joined = JoinedDataset(parts)
        assert len(joined) == len(parts[0]) + len(parts[1])
        last, own = joined.semantic_map(len(joined) - 1), parts[1].semantic_map(len(parts[1]) - 1)
        assert last is not None and own is not None and np.array_equal(last, own)
    with pytest.raises(DataError, match="cannot be joined: only one of them has classes of objects"):
        JoinedDataset([open_dataset(panoptic[0]), open_dataset(semantic[0])])


def test_a_list_in_the_json(demo_data: Path, tmp_path: Path) -> None:
    raw = tiny_run(demo_data, tmp_path)
    train = raw["giantdet"]["data"]["train"]
    raw["giantdet"]["data"]["train"] = [train, {**train, "annotations": str(demo_data / "val.json")}]
    run = parse_run(raw)
    again = parse_run(json.loads(describe(run)))
    assert again.giantdet.data.train == run.giantdet.data.train
    assert run.giantdet.data.train is not None
    assert len(open_dataset(run.giantdet.data.train)) == 12 + len(
        open_dataset(CocoDatasetConfig(annotations=str(demo_data / "val.json"), images=train["images"]))
    )
    raw["giantdet"]["data"]["train"][1]["annotations"] = "no.json"
    with pytest.raises(ConfigError, match=r"^giantdet.data.train.parts.1.annotations: no file no.json"):
        check_data(parse_run(raw))


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ({"images": "a"}, "giantdet.data.train.parts.1.annotations is missing"),
        (
            {"annotations": "a", "imagse": "b"},
            "unknown key giantdet.data.train.parts.1.imagse; did you mean",
        ),
        ("a.json", 'giantdet.data.train.parts.1 must be an object, got "a.json"'),
        (
            {"format": "coc"},
            'data.train.parts.1.format must be one of "coco", .*; did you mean coco?',
        ),
    ],
)
def test_mistakes_in_a_list(part: Any, line: str, demo_data: Path, tmp_path: Path) -> None:
    raw = tiny_run(demo_data, tmp_path)
    raw["giantdet"]["data"]["train"] = [raw["giantdet"]["data"]["train"], part]
    with pytest.raises(ConfigError, match=line):
        parse_run(raw)
