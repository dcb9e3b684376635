"""Reading labels: forms of boxes and masks, exporters' categories, file names, the summary."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs.annotations import good_content
from PIL import Image
from pycocotools import mask as mask_util

from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.dataset import check_files, check_targets
from giantdet.data.loader import train_loader
from giantdet.data.near_files import hint, near_file
from giantdet.data.reading import read_records
from giantdet.data.segments import segment
from giantdet.errors import DataError

# A 40 x 20 image with three boxes x, y, w, h; read as corners they all still fit the image.
BOXES = [[5, 5, 10, 8], [12, 3, 20, 9], [20, 8, 18, 10]]
WRITTEN: dict[str, Any] = {
    "relative": lambda x, y, w, h: [x / 40, y / 20, w / 40, h / 20],
    "corners": lambda x, y, w, h: [x, y, x + w, y + h],
}


def content_of(boxes: list[list[float]], **fields: Any) -> dict[str, Any]:
    content = good_content()
    for record, box in zip(content["annotations"], boxes, strict=True):
        record |= {"bbox": box, "segmentation": None} | fields
    return content


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("with_area", [True, False])
def test_boxes_in_another_form_are_refused(written: str, with_area: bool) -> None:
    content = content_of([WRITTEN[written](*box) for box in BOXES])
    for record, (_, _, w, h) in zip(content["annotations"], BOXES, strict=True):
        record["area"] = w * h if with_area else None
    with pytest.raises(DataError, match="lie in 0 to 1" if written == "relative" else "are corners"):
        read_records("a.json", content)


def test_boxes_in_cocos_form_are_accepted() -> None:
    """Boxes may reach beyond the image, cover it, or be one pixel in its corner."""
    for box in ([5, 5, 38, 10], [0, 0, 40, 20], [0, 0, 1, 1], [1, 1, 39, 19]):
        records = read_records("a.json", content_of([box, *BOXES[1:]], area=None))
        assert len(records.annotations) == 3 and set(records.noted) <= {"box in 0 to 1"}


def test_likely_other_forms_are_counted() -> None:
    corners = [WRITTEN["corners"](*box) for box in BOXES]
    records = read_records("a.json", content_of([*corners[1:], [30, 5, 4, 8]], area=None))
    assert records.noted == {"box of corners?": 2} and len(records.annotations) == 3
    records = read_records("a.json", content_of([[0.1, 0.2, 0.3, 0.4], *BOXES[1:]]))
    assert records.noted == {"box in 0 to 1": 1}


POLYGON = [5, 5, 15, 5, 15, 13, 5, 13]
POINTS = [[5, 5], [15, 5], [15, 13], [5, 13]]


@pytest.mark.parametrize("meant", [[POLYGON], POLYGON, POINTS, [POINTS], [POINTS, POLYGON]])
def test_one_polygon_in_any_nesting(meant: Any) -> None:
    usable, _ = segment(meant, (20, 40))
    expected = mask_util.decode(mask_util.merge(mask_util.frPyObjects([POLYGON], 20, 40)))
    assert (mask_util.decode(mask_util.merge(mask_util.frPyObjects(usable, 20, 40))) == expected).all()


@pytest.mark.parametrize("written", ["string", "counts", "floats"])
def test_a_missing_box_is_computed_from_the_rle(written: str) -> None:
    mask = np.zeros((20, 40), np.uint8, order="F")
    mask[4:9, 7:30] = 1
    string = mask_util.encode(mask)["counts"].decode()
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=0, append=2)), prepend=0).tolist()
    counts = {"string": string, "counts": runs, "floats": [float(run) for run in runs]}[written]
    size = [20.0, 40.0] if written == "floats" else [20, 40]
    content = good_content()
    content["annotations"][0] |= {"segmentation": {"size": size, "counts": counts}, "bbox": None}
    records = read_records("a.json", content)
    assert records.annotations[0]["bbox"] == [7, 4, 23, 5] and records.noted == {"no box": 1}


def test_ids_and_sizes_as_floats_are_the_same_file() -> None:
    def floats(value: Any) -> Any:
        return json.loads(json.dumps(value), parse_int=float)

    one, other = read_records("a", good_content()), read_records("a", floats(good_content()))
    assert one.categories == other.categories and one.images == other.images and not other.skipped
    assert one.annotations == other.annotations and not other.noted
    assert all(type(record["image_id"]) is type(record["id"]) is int for record in other.annotations)


def test_a_valid_record_is_not_changed() -> None:
    content = good_content()
    before = copy.deepcopy(content)
    records = read_records("a.json", content)
    assert all(mine is given for mine, given in zip(records.annotations, content["annotations"], strict=True))
    assert content == before


@pytest.mark.parametrize(
    ("supercategories", "left"),
    [
        ({"root": "none", "cell": "root", "dust": "root"}, ["cell", "dust"]),
        ({"root": "", "cell": "root", "dust": "root"}, ["cell", "dust"]),
        (
            {"root": "none", "cell": "root", "dust": "other"},
            ["root", "cell", "dust"],
        ),  # not everyone's parent
        ({"root": "thing", "cell": "root", "dust": "root"}, ["root", "cell", "dust"]),  # it is a class itself
        ({"root": "none", "cell": "none", "dust": "none"}, ["root", "cell", "dust"]),
    ],
)
def test_root_category(supercategories: dict[str, str], left: list[str]) -> None:
    content = good_content()
    content["categories"].insert(0, {"id": 0, "name": "root"})
    for record in content["categories"]:
        record["supercategory"] = supercategories[record["name"]]
    assert sorted(read_records("a", content).categories.values()) == sorted(left)
    content["annotations"][0]["category_id"] = 0
    assert len(read_records("a", content).categories) == 3, "it has an object"


def dataset_of(folder: Path, content: dict[str, Any]) -> CocoDataset:
    for name in "abc":
        Image.new("RGB", (40, 20)).save(folder / f"{name}.png")
    (folder / "a.json").write_text(json.dumps(content))
    return CocoDataset(folder / "a.json", folder)


def test_summary(tmp_path: Path) -> None:
    content = good_content()
    first = content["annotations"][0]
    for n, fields in enumerate(
        [{"iscrowd": 1}, {"ignore": 1}, {"segmentation": []}, {"bbox": [1, 1, 0.5, 3]}, {"bbox": [1]}]
    ):
        content["annotations"].append(first | {"id": 10 + n} | fields)
    del content["annotations"][2]  # the annotation of the third image
    summary = dataset_of(tmp_path, content).summary()
    expected = {"images": 3, "images_without_objects": 1, "objects": 4, "crowds": 1, "ignored": 1, "tiny": 1}
    found = summary.as_json()
    assert {key: found[key] for key in expected} == expected and found["without_mask"] == 1
    assert found["objects_per_class"] == {"cell": 4, "dust": 0}
    assert found["classes_without_objects"] == ["dust"] and found["left_out"] == {"bad box": 1}
    assert found["objects_by_size"] == {"small": 4, "medium": 0, "large": 0}
    sizes = sorted((i["width"] * i["height"], i["width"], i["height"]) for i in content["images"])
    assert (found["smallest_image"], found["largest_image"]) == (list(sizes[0][1:]), list(sizes[-1][1:]))
    assert "cell 4, dust 0" in summary.text("x") and "classes without objects: dust" in summary.text("x")


def test_an_object_without_a_mask_has_only_a_box_target(tmp_path: Path) -> None:
    content = good_content()
    content["annotations"][1]["segmentation"] = [[]]
    dataset = dataset_of(tmp_path, content)
    assert dataset.has_masks and dataset.without_mask == 1
    config = DataConfig(size=(64, 64), short_side=32, max_objects=2, mask_frame=28, workers=0)
    batch = next(train_loader(dataset, config, 3))
    for image_id, frames_M4, masks, valid in zip(
        batch.image_ids_B,
        batch.targets.frames_BM4,
        batch.targets.masks_BMSS,
        batch.targets.valid_BM,
        strict=True,
    ):
        has_mask = int(image_id) != 2
        assert valid.tolist() == [True, False]
        assert bool(frames_M4[0, 2] > frames_M4[0, 0]) == has_mask == bool(masks[0].any())


def test_data_that_a_model_cannot_be_trained_on(tmp_path: Path) -> None:
    boxes = dataset_of(tmp_path, content_of(BOXES))
    check_targets(boxes, {"boxes"}, "")
    with pytest.raises(DataError, match=r"no object has a mask.*; switch it off"):
        check_targets(boxes, {"boxes", "masks"}, "; switch it off")
    check_targets(dataset_of(tmp_path, good_content()), {"boxes", "masks"}, "")
    ignored = dataset_of(tmp_path, content_of(BOXES, ignore=1))
    with pytest.raises(DataError, match=r"of its records 3 are ignored objects"):
        check_targets(ignored, {"boxes"}, "")
    config = DataConfig(size=(64, 64), short_side=32, filter_empty=False, workers=0)
    with pytest.raises(DataError, match="has an object"):
        train_loader(ignored, config, 1)


def test_a_folder_without_the_images(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "empty").mkdir()
    dataset = dataset_of(tmp_path / "val", good_content())
    check_files(dataset)
    with pytest.raises(DataError, match=r"none of its images exists, e\.g\. .*did you mean .*val/a\.png\?"):
        check_files(CocoDataset(dataset.annotations, tmp_path / "empty"))
    for name in "ab":
        (tmp_path / f"val/{name}.png").unlink()
    check_files(dataset)  # one exists: missing ones are counted when they are read


@pytest.mark.parametrize(
    ("stored", "written"),
    [
        ("a b.png", "images\\a b.png"),
        ("sub/a.png", "sub\\a.png"),
        ("a b.png", "a%20b.png"),
        ("e\u0301_0.png", "\u00e9_0.png"),
        ("\u00e9_0.png", "e\u0301_0.png"),
        ("a.JPG", "a.jpg"),
        ("A.png", "a.png"),
        ("a.png", "train2017/a.png"),
        ("a.png", "/data/user/images/a.png"),
        ("a.jpg", "a.png"),
        ("train2017/a.png", "a.png"),
        ("../other/a.png", "a.png"),
    ],
)
def test_similar_files_are_found(tmp_path: Path, stored: str, written: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "unrelated.png").touch()
    file = folder / stored
    file.parent.mkdir(exist_ok=True)
    file.touch()
    near = near_file(folder, written)
    assert near is not None and near.samefile(file)
    assert near_file(folder, "b.png") is None and hint(folder, folder / "b.png") == ""


def test_the_error_of_a_missing_image_names_the_file(tmp_path: Path) -> None:
    content = good_content()
    content["images"][0]["file_name"] = "A.PNG"
    with pytest.raises(DataError, match=r"A\.PNG: No such file or directory; did you mean .*a\.png\?"):
        dataset_of(tmp_path, content).read_image(0)
