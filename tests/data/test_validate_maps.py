"""`giantdet validate-data` on panoptic and semantic data sets: a table of faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import demo_section, edit_json, tiny_run

from giantdet import cli
from giantdet.config.datasets import FORMATS
from giantdet.data.dataset import CHECKS, open_dataset
from giantdet.data.demo import make_demo
from giantdet.data.validate import Problem, Report
from giantdet.errors import DataError

Found = list[tuple[str, Any, str]]


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Four training images of 64 pixels, 000000 to 000003 with the ids 1 to 4."""
    make_demo(tmp_path, train_images=4, val_images=2, size=64)
    return tmp_path


def report(demo: Path, kind: str, **keys: Any) -> Report:
    section = demo_section(demo, "train", kind) | keys
    return CHECKS[section["format"]](FORMATS[section["format"]].model_validate(section))


def errors_and_warnings(problems: list[Problem]) -> Found:
    """Return errors and warnings only; the counts of classes and objects are information."""
    return [(p.kind, p.id, p.level) for p in problems if p.level != "info"]


def paint(file: Path, value: int | tuple[int, int, int], rows: int = 1) -> None:
    pixels = np.array(Image.open(file))
    pixels[:rows] = value
    Image.fromarray(pixels).save(file)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:60])


# Semantic maps

Change = Callable[[Path], Any]
LABEL, IMAGE = "semantic_train/000002.png", "train/000002.jpg"
SEMANTIC: list[tuple[str, Change, Found]] = [
    ("good", lambda demo: None, []),
    (
        "no label map",
        lambda demo: (demo / LABEL).unlink(),
        [("no label map", "000002.jpg", "warning")],
    ),
    (
        "no image",
        lambda demo: (demo / IMAGE).unlink(),
        [("label map without an image", "000002.png", "warning")],
    ),
    ("image cut off", lambda demo: cut(demo / IMAGE), [("unreadable file", "000002.jpg", "error")]),
    ("labels cut off", lambda demo: cut(demo / LABEL), [("unreadable label map", "000002.jpg", "error")]),
    (
        "both cut off",
        lambda demo: (cut(demo / LABEL), cut(demo / IMAGE)),
        [("unreadable label map", "000002.jpg", "error"), ("unreadable file", "000002.jpg", "error")],
    ),
    (
        "a link to labels that are gone",
        lambda demo: ((demo / LABEL).unlink(), (demo / LABEL).symlink_to("nowhere.png")),
        [("missing label map", "000002.jpg", "error")],
    ),
    (
        "labels of another size",
        lambda demo: Image.new("L", (32, 64)).save(demo / LABEL),
        [("size mismatch", "000002.jpg", "error")],
    ),
    ("unknown label", lambda demo: paint(demo / LABEL, 7), [("unknown label", "000002.jpg", "error")]),
    (
        "colours for labels",
        lambda demo: Image.new("RGB", (64, 64)).save(demo / LABEL),
        [("unknown label", "000002.jpg", "error")],
    ),
    (
        "two images of one label map",
        lambda demo: shutil.copy(demo / IMAGE, demo / "train/000002.jpeg"),
        [("duplicate label map", "000002.jpg", "warning")],
    ),
]


@pytest.mark.parametrize(("change", "expected"), [row[1:] for row in SEMANTIC], ids=[r[0] for r in SEMANTIC])
def test_semantic(demo: Path, change: Change, expected: Found) -> None:
    change(demo)
    found = report(demo, "semantic_fpn")
    assert errors_and_warnings(found.problems) == expected
    assert all(p.text.startswith(("image 000002.jp", "label map 000002.png: ")) for p in found.problems[:1])
    usable = 4 - any(kind in ("no label map", "label map without an image") for kind, *_ in expected)
    assert found.summary.images == usable + (
        expected[:1] == [("duplicate label map", "000002.jpg", "warning")]
    )


def test_numbers_of_unknown_labels(demo: Path) -> None:
    paint(demo / LABEL, 7, rows=16)
    (problem,) = [p for p in report(demo, "semantic_fpn").problems if p.level == "error"]
    assert problem.text.startswith(
        f"image 000002.jpg: {demo / LABEL}: label 7 is none of the 6 classes (25.0%"
    )


def test_classes_of_semantic_maps(demo: Path) -> None:
    """Duplicate names; classes without pixels; maps without a class. The classes have ids 0 to 5."""
    for file in (demo / "semantic_train").iterdir():
        paint(file, 255 if file.name == "000002.png" else 1, rows=64)
    classes = ["sky", "road", "sky", "car", "tree", "sea"]
    problems = report(demo, "semantic_fpn", classes=classes).problems
    assert [(p.kind, p.id, p.level) for p in problems] == [
        ("duplicate class name", 2, "warning"),
        ("no labels", "000002.jpg", "info"),
        *(("class without pixels", n, "info") for n in (0, 2, 3, 4, 5)),
    ]


def test_semantic_sets_that_cannot_be_used(demo: Path) -> None:
    with pytest.raises(DataError, match="no label map belongs to one of the 4 images"):
        report(demo, "semantic_fpn", label_suffix="_gt")
    with pytest.raises(DataError, match="semantic_train: ignore: no class is called 'sky'"):
        report(demo, "semantic_fpn", ignore=["sky"])


# Panoptic data

PNG = "panoptic_train/000002.png"


def changed(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Return a change of the panoptic JSON."""

    def made(demo: Path) -> None:
        edit_json(demo / "panoptic_train.json", change)

    return made


def third(content: dict[str, Any]) -> Any:
    return content["annotations"][2]


def segment(**fields: Any) -> Change:
    """Add a segment to the third image."""
    record = {"id": 77, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0} | fields
    return changed(lambda content: third(content)["segments_info"].append(record))


def duplicate(content: dict[str, Any]) -> None:
    """Duplicate the first segment, a thing, of the third image."""
    third(content)["segments_info"].append(dict(third(content)["segments_info"][0]))


NEEDLESS = ("segment without a pixel", 77, "warning")
PANOPTIC: list[tuple[str, Change, Found]] = [
    ("good", lambda demo: None, []),
    ("no PNG", lambda demo: (demo / PNG).unlink(), [("missing segments file", 3, "error")]),
    ("PNG cut off", lambda demo: cut(demo / PNG), [("unreadable segments file", 3, "error")]),
    (
        "PNG of another size",
        lambda demo: Image.new("RGB", (32, 64)).save(demo / PNG),
        [("segments of another size", 3, "error")],
    ),
    ("no image", lambda demo: (demo / IMAGE).unlink(), [("missing file", 3, "error")]),
    ("image cut off", lambda demo: cut(demo / IMAGE), [("unreadable file", 3, "error")]),
    (
        "image of another size",
        lambda demo: Image.new("RGB", (32, 64)).save(demo / IMAGE),
        [("size mismatch", 3, "error")],
    ),
    (
        "no pixel of an object",
        segment(),
        [("segment without a pixel", 77, "error")],
    ),
    ("no pixel of a crowd", segment(iscrowd=1), [NEEDLESS]),
    ("no pixel of stuff", segment(category_id=92), [NEEDLESS]),
    ("unknown category", segment(category_id=99), [("bad segment", 77, "error")]),
    ("id 0", segment(id=0, category_id=92), [("bad segment", 0, "error")]),
    ("bad iscrowd", segment(category_id=92, iscrowd="maybe"), [("bad segment", 77, "error")]),
    (
        "a segment of text",
        changed(lambda c: third(c)["segments_info"].append("x")),
        [("bad segment", None, "error")],
    ),
    ("one id twice", changed(duplicate), [("duplicate segment id", "FIRST", "warning")]),
    (
        "no annotation of an image",
        changed(lambda c: c["annotations"].pop(2)),
        [("no annotation", 3, "warning")],
    ),
    (
        "two annotations of an image",
        changed(lambda c: c["annotations"].append(dict(third(c)))),
        [("duplicate annotation", 3, "error")],
    ),
    (
        "an annotation of no image",
        changed(lambda c: c["annotations"].append(third(c) | {"image_id": 99})),
        # Read as an annotation of an instances JSON too, object by object.
        [("unknown image", "OBJECTS", "error"), ("unknown image", 99, "error")],
    ),
    (
        "no segments_info",
        changed(lambda c: third(c).pop("segments_info")),
        [("no segments_info", 3, "error"), ("no annotation", 3, "warning")],
    ),
    (
        "a path outside",
        changed(lambda c: third(c).update(file_name="../x.png")),
        [("bad file name", 3, "error"), ("no annotation", 3, "warning")],
    ),
    (
        "a duplicate category",
        changed(lambda c: c["categories"].append(dict(c["categories"][0]))),
        [("duplicate category id", 1, "error")],
    ),
    (
        "a category without id",
        changed(lambda c: c["categories"].append({"name": "x"})),
        [("bad category id", None, "error")],
    ),
    (
        "two categories of one name",
        changed(lambda c: c["categories"].append(c["categories"][-1] | {"id": 99})),
        [("duplicate category name", 99, "warning")],
    ),
    (
        "an image twice",
        changed(lambda c: c["images"].append(dict(c["images"][2]))),
        [("duplicate image id", 3, "error")],
    ),
]


@pytest.mark.parametrize(("change", "expected"), [row[1:] for row in PANOPTIC], ids=[r[0] for r in PANOPTIC])
def test_panoptic(demo: Path, change: Change, expected: Found) -> None:
    content = json.loads((demo / "panoptic_train.json").read_text())
    own = third(content)["segments_info"]
    things = [s["id"] for s in own if s["category_id"] in (1, 3, 4, 7)]
    wanted: Found = []
    for kind, name, level in expected:
        names = things if name == "OBJECTS" else [own[0]["id"] if name == "FIRST" else name]
        wanted += [(kind, n, level) for n in names]
    change(demo)
    found = report(demo, "panoptic_fpn")
    assert errors_and_warnings(found.problems) == wanted
    assert found.summary == open_dataset(section_of(demo)).summary()


def section_of(demo: Path) -> Any:
    section = demo_section(demo, "train", "panoptic_fpn")
    return FORMATS[section["format"]].model_validate(section)


def test_ids_without_a_segment(demo: Path) -> None:
    """A row with the id 9 + 256 x 2: 64 pixels are void, and a segment that loses all its pixels is named."""
    paint(demo / PNG, (9, 2, 0))
    (problem, *others) = [p for p in report(demo, "panoptic_fpn").problems if p.level != "info"]
    assert (problem.kind, problem.id, problem.level) == ("id without a segment", 3, "warning")
    assert problem.text == f"image 3: {demo / PNG}: 64 pixels have ids of no segment, e.g. 521; they are void"
    assert not others
    paint(demo / PNG, (9, 2, 0), rows=64)
    kinds = [p.kind for p in report(demo, "panoptic_fpn").problems if p.level != "info"]
    segments = third(json.loads((demo / "panoptic_train.json").read_text()))["segments_info"]
    assert kinds == ["id without a segment"] + ["segment without a pixel"] * len(segments)


def test_one_png_for_two_images(demo: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        first = content["annotations"][0]
        content["annotations"][2] |= {key: first[key] for key in ("file_name", "segments_info")}

    changed(change)(demo)
    assert errors_and_warnings(report(demo, "panoptic_fpn").problems) == [
        ("duplicate segments file", 3, "warning")
    ]


def test_objects_in_a_separate_file(demo: Path) -> None:
    """Records of that file are checked one by one, and masks are not read from the PNG files."""
    content = json.loads((demo / "train.json").read_text())
    content["annotations"][0] |= {"bbox": [1, 2, 0, 4]}
    content["annotations"][1] |= {"iscrowd": None}
    ids = [record["id"] for record in content["annotations"][:2]]
    (demo / "objects.json").write_text(json.dumps(content))
    segment()(demo)
    found = report(demo, "panoptic_fpn", instances=str(demo / "objects.json"))
    assert errors_and_warnings(found.problems) == [
        ("empty box", ids[0], "error"),
        ("no iscrowd", ids[1], "warning"),
        NEEDLESS,
    ]


def test_a_real_panoptic_set(shared: Path) -> None:
    """Two images of COCO have no problem."""
    folder = shared / "data/panopticapi_sample2"
    file = folder / "annotations/panoptic_val.json"
    section = {"format": "coco_panoptic", "annotations": str(file), "images": str(folder / "images")}
    found = CHECKS["coco_panoptic"](FORMATS["coco_panoptic"].model_validate(section))
    assert errors_and_warnings(found.problems) == [] and found.summary.objects > 20


# The command


def test_the_command(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """data.train is a list, and data.val has another format; the exit code tells whether there are errors."""
    raw = tiny_run(demo, demo / "out", "panoptic_fpn")
    one = demo_section(demo, "train", "panoptic_fpn")
    raw["giantdet"]["data"]["train"] = [one, demo_section(demo, "val", "panoptic_fpn")]
    raw["giantdet"]["data"]["val"] = demo_section(demo, "val", "semantic_fpn")
    file = demo / "run.json"
    file.write_text(json.dumps(raw))
    command = ["validate-data", "--config", str(file)]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    titles = [line.split(" images")[0] for line in out.splitlines() if line.startswith("data.")]
    assert titles == ["data.train.0: 4", "data.train.1: 2", "data.train: 6", "data.val: 2"]
    (demo / PNG).unlink()
    assert cli.main(command) == 1
    out = capsys.readouterr().out
    assert "error: missing segments file: 1\n" in out and "data.train: " not in out
    # Parts without errors of their own that cannot be joined.
    raw["giantdet"]["data"]["train"] = [demo_section(demo, "val"), demo_section(demo, "val", "semantic_fpn")]
    file.write_text(json.dumps(raw))
    assert cli.main(command) == 2
    assert "data sets that are joined need the same kinds of targets" in capsys.readouterr().err


def test_missing_arguments_of_the_command(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tiny_run(demo, demo / "out", giantdet__data__train=None, giantdet__data__val=None)
    (demo / "run.json").write_text(json.dumps(raw))
    config = ["--config", str(demo / "run.json")]
    for arguments, text in (
        ([], "give a COCO instances JSON and the folder of its images, or --config JSON"),
        ([str(demo / "train.json")], "give a COCO instances JSON"),
        ([str(demo / "train.json"), str(demo / "train"), *config], "give a COCO instances JSON"),
        (config, "giantdet.data.train is missing"),
    ):
        assert cli.main(["validate-data", *arguments]) == 2
        assert text in capsys.readouterr().err


def test_a_list_of_images(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((demo / "val.json").read_text())
    (demo / "list.json").write_text(json.dumps({key: content[key] for key in ("images", "categories")}))
    assert cli.main(["validate-data", str(demo / "list.json"), str(demo / "val")]) == 0
    out = capsys.readouterr().out
    assert "warning: no annotations: 1\n" in out and "no objects" not in out
