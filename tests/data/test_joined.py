"""Joined data sets against one file that was merged by hand."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import REPO, free_port, launch, logs, tiny_run

from giantdet import cli
from giantdet.config.checks import parse_giantdet
from giantdet.config.classes import Classes
from giantdet.config.datasets import (
    CocoDatasetConfig,
    CocoPanopticDatasetConfig,
    SemanticPngDatasetConfig,
    sections,
)
from giantdet.config.identity import identity, refusal
from giantdet.config.load import load_run, parse_run
from giantdet.config.resolve import check_data, describe, resolve
from giantdet.config.resolved import load_resolved
from giantdet.config.types import DataConfig
from giantdet.data.dataset import Dataset, open_dataset
from giantdet.data.demo import CATEGORIES
from giantdet.data.loader import train_loader
from giantdet.data.samples import make_sample
from giantdet.data.transforms import draw_geometry
from giantdet.data.truth import ground_truth
from giantdet.errors import ConfigError, DataError
from giantdet.evaluation.coco import all_scores
from giantdet.evaluation.coco_results import CocoResults

CONFIG = DataConfig(size=(64, 64), short_side=64, max_objects=8, mask_frame=28, workers=0)


def coco(file: Path, images: Path) -> CocoDatasetConfig:
    return CocoDatasetConfig(annotations=str(file), images=str(images))


@pytest.fixture
def files(demo_data: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Two files with clashing ids and different category ids, and both merged under new ids."""
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
    """Return objects, some with a too large box, some of another class; no two scores are equal."""
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


def test_equals_one_merged_file(
    files: tuple[Path, Path, Path], demo_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, merged = files
    images = demo_data / "val"
    with caplog.at_level(logging.WARNING, "giantdet"):
        joined = open_dataset((coco(one, images), coco(two, images)))
    whole = open_dataset(coco(merged, images))
    count = len(joined) // 2
    assert f"{count} image ids occur in an earlier data set" in caplog.text
    assert "matched by name" in caplog.text
    assert len(set(joined.image_ids.tolist())) == len(joined) == len(whole)
    parts = ((str(one), count), (str(two), count))
    assert joined.summary() == replace(whole.summary(), images_by_part=parts)
    assert joined.classes == whole.classes
    assert joined.summary().text("data.train").endswith(f"  {one}: {count} images\n  {two}: {count} images")
    for filter_empty in (True, False):
        chosen = joined.training_indices(filter_empty)
        np.testing.assert_array_equal(chosen, whole.training_indices(filter_empty))
    for i in range(len(whole)):
        height, width = whole.sizes_hw[i].tolist()
        geometry = draw_geometry(np.random.default_rng(i), (height, width), CONFIG, training=True)
        ours, theirs = (
            make_sample(d, i, i, CONFIG, geometry, frozenset(("boxes", "masks"))) for d in (joined, whole)
        )
        for name in ("image_hw3", "boxes_N4", "labels_N", "masks_NSS", "frames_N4"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    content = joined.instances()
    for key in ("images", "annotations"):
        ids = [record["id"] for record in content[key]]
        assert len(set(ids)) == len(ids) == len(whole.instances()[key])
    scores = [
        all_scores(ground_truth(d.annotations, d.instances()), CocoResults.of(results(d)), False, 100)
        for d in (joined, whole)
    ]
    assert scores[0] == scores[1] and scores[0]


def test_the_stream_of_training(files: tuple[Path, Path, Path], demo_data: Path) -> None:
    """The batches of a run equal those of the merged file, up to image ids."""
    images = demo_data / "val"
    joined = open_dataset((coco(files[0], images), coco(files[1], images)))
    whole = open_dataset(coco(files[2], images))
    number = dict(zip(whole.image_ids.tolist(), joined.image_ids.tolist(), strict=True))
    ours, theirs = (train_loader(dataset, CONFIG, 3, seed=5) for dataset in (joined, whole))
    seen = set()
    for _ in range(2 * len(whole) // 3):
        mine, other = next(ours), next(theirs)
        assert mine.image_ids_B.tolist() == [number[i] for i in other.image_ids_B.tolist()]
        seen |= set(mine.image_ids_B.tolist())
        assert torch.equal(mine.images_B3HW, other.images_B3HW)
        for found, expected in zip(mine.targets, other.targets, strict=True):
            assert torch.equal(found, expected)
    assert seen == set(joined.image_ids[joined.training_indices(True)].tolist())


def test_ids_that_clash_with_later_ones(files: tuple[Path, Path, Path], demo_data: Path) -> None:
    """Only ids that are taken are replaced, and no new id occurs in a later part."""
    ids = ([1, 2, 3, 4, 5], [3, 4, 8, 9, 2**63 - 1], [6, 7, 1, 10, 11])
    paths = []
    for part, numbers in enumerate(ids):
        content = json.loads(files[0].read_text())
        new = {r["id"]: n for r, n in zip(content["images"], numbers, strict=True)}
        for record in content["images"]:
            record["id"] = new[record["id"]]
        for record in content["annotations"]:
            record["image_id"] = new[record["image_id"]]
        content["annotations"][0] |= {"image_id": 999}  # an unknown image, even after renumbering
        paths.append(files[0].with_name(f"part{part}.json"))
        paths[-1].write_text(json.dumps(content))
    joined = open_dataset(tuple(coco(path, demo_data / "val") for path in paths))
    expected = [1, 2, 3, 4, 5, 12, 13, 8, 9, 2**63 - 1, 6, 7, 14, 10, 11]
    assert joined.image_ids.tolist() == expected
    assert [record["id"] for record in joined.instances()["images"]] == expected
    assert joined.summary().left_out == {"unknown image": 3}
    truth = ground_truth(joined.annotations, joined.instances())
    for i, number in enumerate(expected):
        assert len(truth.getAnnIds(imgIds=number)) == len(joined.objects(i))


def test_a_list_of_one_data_set(files: tuple[Path, Path, Path], demo_data: Path) -> None:
    assert type(open_dataset((coco(files[0], demo_data / "val"),))).__name__ == "CocoDataset"


def test_a_missing_name(files: tuple[Path, Path, Path], demo_data: Path) -> None:
    content = json.loads(files[1].read_text())
    content["categories"][0]["name"] = "hexagon"
    files[1].write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"two\.json: category 'hexagon' .*one\.json"):
        open_dataset(tuple(coco(file, demo_data / "val") for file in files[:2]))


def test_one_part_without_its_images(files: tuple[Path, Path, Path], demo_data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"two\.json: none of its images exists, e\.g\. .*empty"):
        open_dataset((coco(files[0], demo_data / "val"), coco(files[1], tmp_path / "empty")))


def test_one_part_without_masks(
    files: tuple[Path, Path, Path], demo_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Objects with only boxes are trained beside those with masks, as in one file, with a warning."""
    content = json.loads(files[1].read_text())
    for record in content["annotations"]:
        del record["segmentation"]
    files[1].write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, "giantdet"):
        joined = open_dataset(tuple(coco(file, demo_data / "val") for file in files[:2]))
    objects = joined.summary().objects
    assert f"{objects // 2} of {objects} objects have no mask, all those of {files[1]}" in caplog.text
    half = len(joined) // 2
    assert joined.has_masks and joined.objects(0).has_mask(0) and not joined.objects(half).has_mask(0)


def test_lists_of_images(files: tuple[Path, Path, Path], demo_data: Path) -> None:
    """Lists of images can be joined with each other, but not with annotated data."""
    lists = []
    for file in files[:2]:
        content = json.loads(file.read_text())
        lists.append(file.with_name(f"list_{file.name}"))
        lists[-1].write_text(json.dumps({key: content[key] for key in ("images", "categories")}))
    joined = open_dataset(tuple(coco(path, demo_data / "val") for path in lists))
    assert not joined.annotated and len(joined) == len(set(joined.image_ids.tolist())) == 10
    with pytest.raises(DataError, match=r'list_one\.json have no list "annotations"'):
        joined.training_indices(False)
    with pytest.raises(DataError, match=r'list_two\.json have no list "annotations"'):
        open_dataset((coco(files[0], demo_data / "val"), coco(lists[1], demo_data / "val")))


def test_images_without_objects(files: tuple[Path, Path, Path], demo_data: Path) -> None:
    """A part whose list of annotations is empty adds images to evaluate, and none to train on."""
    content = json.loads(files[1].read_text()) | {"annotations": []}
    files[1].write_text(json.dumps(content))
    joined = open_dataset(tuple(coco(file, demo_data / "val") for file in files[:2]))
    alone = open_dataset(coco(files[0], demo_data / "val"))
    assert joined.annotated and len(joined) == 2 * len(alone)
    assert joined.training_indices(True).tolist() == alone.training_indices(True).tolist()
    assert joined.training_indices(False).tolist() == list(range(len(joined)))


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
    file = demo_data / "panoptic_val.json"
    content = json.loads(file.read_text())
    for record in content["categories"]:
        record["id"] += 50
    for record in content["annotations"]:
        for segment in record["segments_info"]:
            segment["category_id"] += 50
    (tmp_path / "other.json").write_text(json.dumps(content))
    keys = {
        "format": "coco_panoptic",
        "images": str(demo_data / "val"),
        "segments": str(file.with_suffix("")),
    }
    one, two = (
        CocoPanopticDatasetConfig.model_validate(keys | {"annotations": str(path)})
        for path in (file, tmp_path / "other.json")
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


def test_evaluation(
    files: tuple[Path, Path, Path],
    demo_data: Path,
    tiny_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`giantdet eval --config` scores as with a merged file, under the ids of the joined set."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "RANK": "0"}
    for name, value in (group | {"LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    images = str(demo_data / "val")
    parts = [{"annotations": str(file), "images": images} for file in files]
    found = []
    for name, val in (("joined", parts[:2]), ("merged", parts[2])):
        raw = tiny_run(demo_data, tmp_path / "out", giantdet__data__val=val)
        (tmp_path / "run.json").write_text(json.dumps(raw))
        results_file = tmp_path / f"results_{name}.json"
        keys = ["--config", str(tmp_path / "run.json"), "--results", str(results_file), "--workers", "0"]
        assert cli.main(["eval", str(tiny_export), *keys]) == 0
        found.append(json.loads(results_file.read_text()))
    merged = open_dataset(coco(files[2], demo_data / "val"))
    joined = open_dataset((coco(files[0], demo_data / "val"), coco(files[1], demo_data / "val")))
    number = dict(zip(merged.image_ids.tolist(), joined.image_ids.tolist(), strict=True))
    assert found[0] == [result | {"image_id": number[result["image_id"]]} for result in found[1]]
    assert found[0]


def test_an_override_of_a_list(demo_data: Path, tmp_path: Path) -> None:
    raw = tiny_run(demo_data, tmp_path)
    raw["giantdet"]["data"]["train"] = [raw["giantdet"]["data"]["train"]] * 2
    (tmp_path / "run.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"data\.train is \[.*, not an object; override the whole list$"):
        load_run(tmp_path / "run.json", ["data.train.annotations=x.json"])
    section = json.dumps([raw["giantdet"]["data"]["val"]])
    train = load_run(tmp_path / "run.json", [f"data.train={section}"]).giantdet.data.train
    assert train is not None
    assert [(place, part.images) for place, part in sections(train)] == [(".0", str(demo_data / "val"))]


def test_a_run(files: tuple[Path, Path, Path], demo_data: Path, tmp_path: Path) -> None:
    """A run trains on, scores and describes lists; its config.json reopens with the same identity."""
    both = [{"annotations": str(file), "images": str(demo_data / "val")} for file in files[:2]]
    shares = [section | {"weight": weight} for section, weight in zip(both, (1.0, 3.0), strict=True)]
    raw = tiny_run(demo_data, tmp_path / "out", giantdet__data__train=shares, giantdet__data__val=both)
    (tmp_path / "run.json").write_text(json.dumps(raw))
    ended = launch(REPO / "scripts/train.py", 1, "--deepspeed_config", tmp_path / "run.json")
    assert [end.code for end in ended] == [0], logs(ended)
    assert f"  {files[1]}: 5 images" in ended[0].out
    assert f"  75.0% of the samples from {files[1]}" in ended[0].out
    described = json.loads((tmp_path / "out/data.json").read_text())
    assert described["train"]["images"] == described["val"]["images"] == 10
    assert described["train"]["images_by_part"] == [[str(files[0]), 5], [str(files[1]), 5]]
    assert {"box", "mask"} <= json.loads((tmp_path / "out/scores.json").read_text()).keys()
    written = load_resolved(tmp_path / "out/config.json")
    assert json.loads(describe(written))["giantdet"]["data"]["train"] == [
        {"format": "coco", **section} for section in shares
    ]
    # The identity that resuming compares contains the classes, not the paths.
    alone = tiny_run(demo_data, tmp_path / "out")
    resolved = resolve(parse_run(alone), 1, 10, Classes(objects=tuple(CATEGORIES.items())))
    assert refusal(identity(written), identity(resolved)) is None
    check_data(written)
    files[1].unlink()
    with pytest.raises(ConfigError, match=r"giantdet\.data\.train\.1\.annotations: file .*two\.json"):
        check_data(written)
