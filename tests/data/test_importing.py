"""import-data: tiny data sets of each format, written by hand, against boxes computed by hand."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from giantdet.commands.import_data import FORMATS as COMMAND_FORMATS
from giantdet.data.importing.convert import Imported, Split, convert
from giantdet.data.importing.formats import FORMATS
from giantdet.data.importing.label_studio import brush_mask
from giantdet.data.importing.recognise import TITLES, hint, recognise
from giantdet.data.importing.scene import Request
from giantdet.data.validate import validate
from giantdet.errors import InputError

WIDTH, HEIGHT = 40, 30
NO_SPLIT = Split()


def image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (9, 9, 9)).save(path, exif=exif)


def write(path: Path, text: str | Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def imported(source: Path, split: Split = NO_SPLIT, **request: Any) -> tuple[Imported, dict[str, Any]]:
    """Import what is recognised; return the result and the content of each file."""
    result = convert("auto", Request(source, **request), source.parent / "out", split, overwrite=True)
    return result, {name: json.loads(path.read_text()) for name, path in result.files.items()}


def objects(content: dict[str, Any]) -> dict[str, list[tuple[str, list[float]]]]:
    """Class and box of the objects, by image."""
    names = {record["id"]: record["name"] for record in content["categories"]}
    found: dict[str, list[tuple[str, list[float]]]] = {r["file_name"]: [] for r in content["images"]}
    files = {record["id"]: record["file_name"] for record in content["images"]}
    for record in content["annotations"]:
        found[files[record["image_id"]]].append((names[record["category_id"]], record["bbox"]))
    return found


def pixels(record: dict[str, Any], size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    rle = record["segmentation"]
    if isinstance(rle, list):
        rle = mask_util.merge(mask_util.frPyObjects(rle, *size))
    return mask_util.decode(rle).astype(bool)


def voc_object(name: str, box: tuple[float, ...], extra: str = "") -> str:
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def voc(name: str, *objects: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    return (
        f"<annotation><filename>{name}</filename><size><width>{size[0]}</width><height>{size[1]}</height>"
        f"<depth>3</depth></size>{''.join(objects)}</annotation>"
    )


def test_voc(tmp_path: Path) -> None:
    """Pixels are counted from 1, the last one is inside; difficult objects are ignored; splits are kept."""
    source = tmp_path / "VOC2007"
    for name in ("a", "b", "c", "d", "f"):
        image(source / f"JPEGImages/{name}.jpg")
    write(
        source / "Annotations/a.xml",
        voc(
            "other.jpg",  # the file was renamed
            voc_object("dog", (1, 1, 40, 30)),
            voc_object("cat", (11, 6, 20, 15), "<difficult>1</difficult>"),
            voc_object("dog", (5, 5, 4, 9)),
            voc_object("", (5, 5, 9, 9)),
            "<object><name>cat</name></object>",
            voc_object("dog", (30, 20, 60, 50)),
            voc_object("dog", (1, 1, 40, 30)),
        ),
    )
    polygon = "<polygon><x1>3</x1><y1>3</y1><x2>13</x2><y2>3</y2><x3>13</x3><y3>23</y3></polygon>"
    write(source / "Annotations/b.xml", voc("b.jpg", voc_object("cat", (3, 3, 13, 23), polygon), size=(0, 0)))
    write(source / "Annotations/c.xml", voc("c.jpg"))
    write(source / "Annotations/d.xml", voc("d.jpg", voc_object("cat", (1, 1, 3, 3)), size=(100, 90)))
    write(source / "Annotations/e.xml", "<annotation><object></annotation>")
    for name, stems in {"train": "a b d e", "val": "c", "trainval": "a b c d e"}.items():
        write(source / f"ImageSets/Main/{name}.txt", "\n".join(stems.split()))
    result, content = imported(source)
    assert list(content) == ["train", "val"]
    assert [r["name"] for r in content["train"]["categories"]] == ["cat", "dog"]
    assert objects(content["train"]) == {
        "a.jpg": [("dog", [0, 0, 40, 30]), ("cat", [10, 5, 10, 10]), ("dog", [29, 19, 11, 11])],
        "b.jpg": [("cat", [2, 2, 10, 20])],
    }
    assert objects(content["val"]) == {"c.jpg": []}
    assert [r.get("ignore", 0) for r in content["train"]["annotations"]] == [0, 1, 0, 0]
    assert content["train"]["annotations"][3]["segmentation"] == [[2, 2, 12, 2, 12, 22]]
    assert content["train"]["annotations"][3]["area"] == pixels(content["train"]["annotations"][3]).sum()
    assert result.notes.left_out == {
        "empty box": 1,
        "object without a class": 1,
        "bad box": 1,
        "object that is written twice": 1,
        "unusable image": 1,
        "unreadable file": 1,
        "image without annotations": 1,
    }
    text = result.text()
    assert "e.xml is not valid XML: mismatched tag: line 1" in text
    assert "d.xml: it is 40 x 30, and its annotations are for 100 x 90" in text
    assert result.summaries["train"].ignored == 1


def test_voc_options(tmp_path: Path) -> None:
    source = tmp_path / "data"
    image(source / "a.png")
    difficult = "<difficult>1</difficult>"
    write(
        source / "a.xml",
        voc("a.png", voc_object("x", (0, 0, 9, 9), difficult), voc_object("y", (5, 5, 9, 9))),
    )
    result, content = imported(source)
    assert objects(content["train"])["a.png"][0] == ("x", [0, 0, 9, 9])
    assert result.notes.mapped["box from pixel 0 where VOC begins with 1"] == 1
    result, content = imported(source, zero_based=True, difficult="object", classes=("y", "x"))
    assert objects(content["train"])["a.png"] == [("x", [0, 0, 9, 9]), ("y", [5, 5, 4, 4])]
    assert [r["name"] for r in content["train"]["categories"]] == ["y", "x"]
    assert not result.notes.mapped and not any(r.get("ignore") for r in content["train"]["annotations"])
    result, content = imported(source, classes=("y",))
    assert result.notes.left_out == {"object of a class that is not in --classes": 1}


@pytest.mark.parametrize("names", ["[cat, dog, bird]", "{0: cat, 1: dog, 2: bird}"])
def test_yolo(tmp_path: Path, names: str) -> None:
    """Boxes by their centres, polygons, keypoints, bad lines; a turned photograph counts as it is shown."""
    source = tmp_path / "yolo"
    write(
        source / "data.yaml",
        f"train: ../train/images\nval: valid/images\nnames: {names}\nkpt_shape: [2, 3]\n",
    )
    image(source / "train/images/a.jpg")
    image(source / "train/images/turned.jpg", orientation=6)
    image(source / "train/images/empty.jpg")
    image(source / "valid/images/v.png")
    lines = [
        "1 0.5 0.5 0.25 0.2",
        "0 0.1 0.1 0.6 0.1 0.6 0.9",
        "2 0.25 0.5 0.5 1 0.2 0.3 2 0.4 0.5 2",
        "3 0.5 0.5 0.1 0.1",
        "0 0.5 0.5 0.1",
        "0 0.5 0.5 -0.1 0.1",
        "0 20 15 10 10",
        "0 a b c d",
        "",
    ]
    write(source / "train/labels/a.txt", "\n".join(lines))
    write(source / "train/labels/turned.txt", "0 0.5 0.5 1 0.5\n")
    write(source / "valid/labels/v.txt", "")
    result, content = imported(source)
    assert [r["name"] for r in content["train"]["categories"]] == ["cat", "dog", "bird"]
    assert objects(content["train"]) == {
        "train/images/a.jpg": [
            ("dog", [15, 12, 10, 6]),
            ("cat", [4, 3, 20, 24]),
            ("bird", [0, 0, 20, 30]),
        ],
        "train/images/empty.jpg": [],
        "train/images/turned.jpg": [("cat", [0, 10, 30, 20])],
    }
    assert [(r["width"], r["height"]) for r in content["train"]["images"]] == [(40, 30), (40, 30), (30, 40)]
    assert objects(content["val"]) == {"valid/images/v.png": []}
    assert content["train"]["annotations"][1]["segmentation"] == [[4, 3, 24, 3, 24, 27]]
    assert result.notes.left_out == {"bad line": 4, "unknown class": 1}
    assert result.notes.mapped == {
        "keypoints that are not read": 1,
        "image without a text file, as background": 1,
    }
    assert "train/labels/a.txt line 5: 4 numbers are neither a box" in result.text()


def test_yolo_without_yaml(tmp_path: Path) -> None:
    source = tmp_path / "darknet"
    image(source / "a.jpg")
    write(source / "a.txt", "0 0.5 0.5 0.5 0.5")
    write(source / "classes.txt", "thing\n")
    _, content = imported(source)
    assert objects(content["train"]) == {"a.jpg": [("thing", [10, 7.5, 20, 15])]}


def labelme(path: Path, name: str, *shapes: dict[str, Any]) -> None:
    content = {"version": "5.0.1", "flags": {}, "imagePath": name, "imageData": None}
    write(path, content | {"shapes": list(shapes), "imageHeight": HEIGHT, "imageWidth": WIDTH})


def test_labelme(tmp_path: Path) -> None:
    source = tmp_path / "labelme"
    image(source / "images/a.jpg")
    mask = np.zeros((5, 8), np.uint8)
    mask[1:4, 2:7] = 255
    png = io.BytesIO()
    Image.fromarray(mask).save(png, "PNG")

    def shape(label: str, points: Any, kind: str | None, **more: Any) -> dict[str, Any]:
        return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}} | more

    labelme(
        source / "a.json",
        r"images\a.jpg",
        shape("cat", [[30, 20], [10, 5]], "rectangle"),
        shape("dog", [[1, 1], [9, 1], [9, 11]], "polygon", group_id=1),
        shape("dog", [[20, 1], [29, 1], [29, 11]], "polygon", group_id=1),
        shape("cat", [[20, 15], [20, 10]], "circle"),
        shape("dog", [[4, 6], [11, 10]], "mask", mask=base64.b64encode(png.getvalue()).decode()),
        shape("cat", [[1, 1], [2, 2]], "line"),
        shape("cat", [[1, 1]], "rectangle"),
        shape("cat", [[1, 1], [2, 2]], "polygon"),
    )
    labelme(source / "gone.json", "gone.jpg", shape("cat", [[1, 1], [2, 2]], "rectangle"))
    write(source / "broken.json", "{")
    result, content = imported(source)
    found = objects(content["train"])["a.jpg"]
    assert found[0] == ("cat", [10, 5, 20, 15])
    assert found[1] == ("dog", [1, 1, 28, 10])
    assert found[2][0] == "cat" and np.allclose(found[2][1], [15, 10, 10, 10], atol=0.02)
    assert found[3] == ("dog", [6, 7, 5, 3])
    records = content["train"]["annotations"]
    assert len(records[1]["segmentation"]) == 2
    whole = np.zeros((HEIGHT, WIDTH), bool)
    whole[7:10, 6:11] = True
    assert (pixels(records[3]) == whole).all() and records[3]["area"] == 15
    assert abs(records[2]["area"] - np.pi * 25) < 4
    assert result.notes.left_out == {
        "line shape, which is not an object": 1,
        "bad shape": 1,
        "bad polygon": 1,
        "object without a usable shape": 1,
        "missing image": 1,
        "unreadable file": 1,
    }
    assert result.notes.mapped == {"shapes of one group_id, joined to one object": 1}


@pytest.mark.parametrize("version", [1, 2])
def test_via(tmp_path: Path, version: int) -> None:
    source = tmp_path / "via"
    image(source / "a.jpg")
    shapes = [
        {"name": "rect", "x": 3, "y": 4, "width": 10, "height": 12},
        {"name": "polygon", "all_points_x": [1, 11, 11], "all_points_y": [2, 2, 22]},
        {"name": "ellipse", "cx": 20, "cy": 15, "rx": 8, "ry": 4, "theta": np.pi / 2},
        {"name": "point", "cx": 1, "cy": 2},
        {"name": "polygon", "all_points_x": [1, 11, 11], "all_points_y": [2, 2]},
    ]
    kinds = ["cat", "dog", {"cat": True, "dog": False}, "cat", "cat"]
    regions = [
        {"shape_attributes": shape, "region_attributes": {"type": kind, "note": ""}}
        for shape, kind in zip(shapes, kinds, strict=True)
    ]
    entry = {
        "filename": "a.jpg",
        "size": 1,
        "file_attributes": {},
        "regions": regions if version == 2 else {str(n): region for n, region in enumerate(regions)},
    }
    entries = {"a.jpg1": entry}
    write(
        source / "via.json", {"_via_settings": {}, "_via_img_metadata": entries} if version == 2 else entries
    )
    result, content = imported(source)
    found = objects(content["train"])["a.jpg"]
    assert found[:2] == [("cat", [3, 4, 10, 12]), ("dog", [1, 2, 10, 20])]
    assert found[2][0] == "cat" and np.allclose(found[2][1], [16, 7, 8, 16], atol=0.02)
    assert result.notes.left_out == {"point region, which is not an object": 1, "bad region": 1}


def test_via_without_attributes(tmp_path: Path) -> None:
    """As the balloons of Mask R-CNN's tutorial: folders of splits, regions without attributes."""
    source = tmp_path / "balloon"
    shape = {"name": "polygon", "all_points_x": [1, 11, 11], "all_points_y": [2, 2, 22]}
    for split in ("train", "val"):
        image(source / f"{split}/{split}.jpg")
        regions = {"0": {"shape_attributes": shape, "region_attributes": {}}}
        write(source / f"{split}/via.json", {"x": {"filename": f"{split}.jpg", "regions": regions}})
    result, content = imported(source, classes=("balloon",))
    assert objects(content["val"]) == {"val/val.jpg": [("balloon", [1, 2, 10, 20])]}
    assert sum(result.notes.mapped.values()) == 2


def test_cvat(tmp_path: Path) -> None:
    source = tmp_path / "cvat"
    image(source / "images/sub/a.jpg")
    image(source / "images/b.jpg")
    # A window of 4 x 3 at (10, 5): 1 pixel of background, 2 of the object, 5, 3, 1, row by row.
    write(
        source / "annotations.xml",
        f"""<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version><meta><task><labels>
        <label><name>dog</name></label><label><name>cat</name></label></labels></task></meta>
        <image id="0" name="sub/a.jpg" subset="Train" width="{WIDTH}" height="{HEIGHT}">
          <box label="cat" occluded="0" xtl="1.5" ytl="2" xbr="11.5" ybr="12" z_order="0"/>
          <box label="cat" xtl="10" ytl="10" xbr="20" ybr="14" rotation="90"/>
          <polygon label="dog" points="5,5;15,5;15,25"/>
          <mask label="dog" rle="1, 2, 5, 3, 1" left="10" top="5" width="4" height="3"/>
          <mask label="dog" rle="1, 2" left="10" top="5" width="4" height="3"/>
          <polyline label="dog" points="1,1;2,2"/>
          <polygon label="dog" points="1,1;2"/>
        </image>
        <image id="1" name="b.jpg" subset="Validation" width="{WIDTH}" height="{HEIGHT}"/>
        <track id="0" label="dog"></track></annotations>""",
    )
    result, content = imported(source)
    assert [r["name"] for r in content["train"]["categories"]] == ["dog", "cat"]
    assert objects(content["train"]) == {
        "sub/a.jpg": [
            ("cat", [1.5, 2, 10, 10]),
            ("cat", [13, 7, 4, 10]),
            ("dog", [5, 5, 10, 20]),
            ("dog", [10, 5, 3, 3]),
        ]
    }
    assert objects(content["val"]) == {"b.jpg": []}
    window = np.zeros((HEIGHT, WIDTH), bool)
    window[5, 11:13] = window[7, 10:13] = True
    assert (pixels(content["train"]["annotations"][3]) == window).all()
    assert result.notes.left_out == {
        "bad shape": 2,
        "polyline, which is not an object": 1,
        "track of a video": 1,
    }


def rle_pack(values: list[int], lengths: tuple[int, ...] = (3, 4, 8, 16)) -> list[int]:
    """The run-length code of thi.ng/rle-pack, for values of 8 bits."""
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{length - 1:04b}" for length in lengths)
    start = 0
    while start < len(values):
        end = start + 1
        while end < len(values) and values[end] == values[start] and end - start < 256:
            end += 1
        repeated = end - start > 1
        if not repeated:
            while end < len(values) and end - start < 8 and values[end] != values[end - 1]:
                end += 1
        count = end - start - 1
        choice = next(n for n, length in enumerate(lengths) if count < 1 << length)
        bits += f"{int(repeated)}{choice:02b}{count:0{lengths[choice]}b}"
        bits += "".join(
            f"{value:08b}" for value in (values[start : start + 1] if repeated else values[start:end])
        )
        start = end
    bits += "0" * (-len(bits) % 8)
    return [int(bits[n : n + 8], 2) for n in range(0, len(bits), 8)]


def test_brush_mask() -> None:
    mask = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.3
    rgba = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, mask * 255  # colour also where it is transparent
    code = rle_pack(rgba.reshape(-1).tolist())
    assert (brush_mask(code, (HEIGHT, WIDTH)) == mask).all()
    for wrong in (code[:-20], code[:8], [300], "x"):
        with pytest.raises(ValueError, match="rle"):
            brush_mask(wrong, (HEIGHT, WIDTH))
    with pytest.raises(ValueError, match="4 for each"):
        brush_mask(code, (HEIGHT, WIDTH + 1))


def test_label_studio(tmp_path: Path) -> None:
    source = tmp_path / "studio"
    image(source / "images/a.jpg")
    image(source / "images/0badcafe-b.jpg")
    whole = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    mask = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    mask[3:6, 7:12] = 255

    def region(kind: str, **value: Any) -> dict[str, Any]:
        return {"type": kind, "value": value} | whole

    result_a = [
        region("rectanglelabels", x=10, y=20, width=50, height=40, rotation=0, rectanglelabels=["cat"]),
        # A box of 16 x 6 pixels at (20, 3), turned by 90 degrees about that corner: 6 x 16 to its left.
        region("rectanglelabels", x=50, y=10, width=40, height=20, rotation=90, rectanglelabels=["dog"]),
        # A region and its label as two results of one id.
        region("polygon", points=[[10, 10], [60, 10], [60, 90]]) | {"id": "p"},
        region("labels", points=[[10, 10], [60, 10], [60, 90]], labels=["dog"]) | {"id": "p"},
        region("polygon", points=[[1, 1], [2, 1], [2, 2]]),
        region("brushlabels", format="rle", rle=rle_pack(mask.reshape(-1).tolist()), brushlabels=["cat"]),
        region("keypointlabels", x=1, y=1, width=1, keypointlabels=["cat"]),
        {"type": "choices", "value": {"choices": ["good"]}},
    ]
    tasks = [
        {
            "id": 1,
            "data": {"image": "/data/local-files/?d=images/a.jpg"},
            "annotations": [{"was_cancelled": True, "result": []}, {"result": result_a}],
        },
        {"id": 2, "data": {"image": "/data/upload/3/0badcafe-b.jpg"}, "annotations": [{"result": []}]},
        {"id": 3, "data": {"image": "/data/upload/3/0badcafe-c.jpg"}, "annotations": []},
    ]
    write(source / "export.json", tasks)
    result, content = imported(source)
    found = objects(content["train"])
    assert found["0badcafe-b.jpg"] == []
    assert found["a.jpg"][0] == ("cat", [4, 6, 20, 12])
    assert found["a.jpg"][1] == ("dog", [14, 3, 6, 16])
    assert found["a.jpg"][2] == ("dog", [4, 3, 20, 24])
    assert found["a.jpg"][3] == ("cat", [7, 3, 5, 3])
    assert result.notes.left_out == {
        "keypoint, which is not an object": 1,
        "object without a class": 1,
        "result that is not an object": 1,
        "missing image": 1,
    }


def test_open_images(tmp_path: Path) -> None:
    source = tmp_path / "oid"
    image(source / "images/0001.jpg")
    head = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction"
    )
    rows = [
        "0001,xclick,/m/01,1,0.1,0.6,0.2,0.7,0,0,0,0",
        "0001,xclick,/m/02,1,0.5,1.0,0.5,1.0,0,0,1,0",
        "0001,xclick,/m/03,1,0.5,0.75,0.5,0.8,0,0,0,1",
        "0001,xclick,/m/01,1,zero,1.0,0.5,1.0,0,0,0,0",
        "0002,xclick,/m/01,1,0.1,0.6,0.2,0.7,0,0,0,0",
    ]
    write(source / "train-annotations-bbox.csv", "\n".join([head, *rows]))
    write(source / "class-descriptions-boxable.csv", "/m/01,Tortoise\n/m/02,Sea turtle\n")
    result, content = imported(source)
    assert objects(content["train"]) == {
        "0001.jpg": [
            ("Tortoise", [4, 6, 20, 15]),
            ("Sea turtle", [20, 15, 20, 15]),
            ("/m/03", [20, 15, 10, 9]),
        ]
    }
    assert [record["iscrowd"] for record in content["train"]["annotations"]] == [0, 1, 0]
    assert result.notes.left_out == {"bad row": 1, "object of an image that is not in the folder": 1}
    assert "train-annotations-bbox.csv line 5: could not convert string to float: 'zero'" in result.text()
    assert len(result.notes.mapped) == 3 and result.summaries["train"].crowds == 1


def test_masks(tmp_path: Path) -> None:
    """One file an object, and one file of numbers an image, give the same objects."""
    first, second = np.zeros((HEIGHT, WIDTH), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8)
    first[2:8, 3:9], second[10:20, 30:] = 1, 1
    bowl, ids = tmp_path / "bowl/stage1_train", tmp_path / "ids"
    image(bowl / "abc/images/abc.png")
    (bowl / "abc/masks").mkdir()
    for name, mask in {"1": first, "2": second, "3": 0 * first}.items():
        Image.fromarray(mask * 255).save(bowl / f"abc/masks/{name}.png")
    Image.fromarray(first[:10] * 255).save(bowl / "abc/masks/4.png")
    result, content = imported(bowl, classes=("nucleus",))
    assert objects(content["train"])["abc.png"] == [("nucleus", [3, 2, 6, 6]), ("nucleus", [30, 10, 10, 10])]
    assert result.notes.left_out["empty mask"] == 1
    assert result.notes.left_out["mask of another size than the image"] == 1
    image(ids / "PNGImages/x.png")
    (ids / "PedMasks").mkdir()
    labels = first.astype(np.uint16) * 700 + second.astype(np.uint16) * 3
    Image.fromarray(labels).save(ids / "PedMasks/x_mask.png")
    _, content = imported(ids)
    assert objects(content["train"])["x.png"] == [("object", [30, 10, 10, 10]), ("object", [3, 2, 6, 6])]
    masks = [pixels(record) for record in content["train"]["annotations"]]
    assert (masks[0] == second.astype(bool)).all() and (masks[1] == first.astype(bool)).all()


def test_split(tmp_path: Path) -> None:
    """The share is exact, a seed gives the same images again, and a new image hardly moves others."""
    source = tmp_path / "data"
    for n in range(20):
        image(source / f"{n}.png")
        write(source / f"{n}.xml", voc(f"{n}.png", voc_object("x", (1, 1, 9, 9))))

    def chosen(seed: int) -> set[str]:
        _, content = imported(source, Split(0.25, seed))
        assert len(content["train"]["images"]) + len(content["val"]["images"]) == len(
            list(source.glob("*.png"))
        )
        return {record["file_name"] for record in content["val"]["images"]}

    first = chosen(0)
    assert len(first) == 5 and chosen(0) == first and chosen(1) != first
    image(source / "new.png")
    write(source / "new.xml", voc("new.png", voc_object("x", (1, 1, 9, 9))))
    assert len(chosen(0) & first) >= 4


def test_coco(tmp_path: Path) -> None:
    """An exporter's folders: a JSON beside the images of each split; crowds and ignored objects stay so."""
    source = tmp_path / "export"
    rle = {"size": [HEIGHT, WIDTH], "counts": [5, 3, HEIGHT * WIDTH - 8]}
    base = {"image_id": 7, "category_id": 3, "area": 1}
    for split in ("train", "valid"):
        image(source / f"{split}/{split}.jpg")
        image_record = {"id": 7, "file_name": f"{split}.jpg", "width": WIDTH, "height": HEIGHT}
        annotations = [
            base | {"id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0},
            base | {"id": 2, "bbox": [0, 5, 1, 3], "iscrowd": 1, "segmentation": rle},
            base | {"id": 3, "bbox": [9, 9, 5, 5], "iscrowd": 0, "ignore": 1},
            base | {"id": 4, "bbox": [9, 9, 0, 5], "iscrowd": 0},
        ]
        categories = [{"id": 3, "name": "dog", "supercategory": "none"}]
        content = {"images": [image_record], "annotations": annotations, "categories": categories}
        write(source / f"{split}/_annotations.coco.json", content)
    result, content = imported(source)
    assert objects(content["val"]) == {
        "valid/valid.jpg": [("dog", [1, 2, 3, 4]), ("dog", [0, 5, 1, 3]), ("dog", [9, 9, 5, 5])]
    }
    records = content["train"]["annotations"]
    assert [record["iscrowd"] for record in records] == [0, 1, 0]
    assert [record.get("ignore", 0) for record in records] == [0, 0, 1]
    assert pixels(records[1]).sum() == 3
    assert result.notes.left_out == {"empty box": 2}


def test_boxes_without_a_stated_size(tmp_path: Path) -> None:
    """An image that EXIF turns counts as it is shown, unless its source states the stored size."""
    source = tmp_path / "data"
    image(source / "a.jpg", orientation=6)
    write(source / "a.xml", voc("a.jpg", voc_object("x", (1, 1, 9, 9))))
    _, content = imported(source)
    assert (content["train"]["images"][0]["width"], content["train"]["images"][0]["height"]) == (40, 30)
    write(source / "a.xml", voc("a.jpg", voc_object("x", (1, 1, 9, 9)), size=(0, 0)))
    _, content = imported(source)
    assert (content["train"]["images"][0]["width"], content["train"]["images"][0]["height"]) == (30, 40)


def test_copied_images_and_an_earlier_import(tmp_path: Path) -> None:
    source = tmp_path / "data"
    image(source / "sub/a.jpg")
    write(source / "sub/a.xml", voc("a.jpg", voc_object("x", (1, 1, 9, 9))))
    result = convert("voc", Request(source), tmp_path / "out", copy=True)
    assert result.images == tmp_path / "out/images"
    assert (result.images / "a.jpg").read_bytes() == (source / "sub/a.jpg").read_bytes()
    assert validate(result.files["train"], result.images) == []
    with pytest.raises(InputError, match=r"has train\.json already"):
        convert("voc", Request(source), tmp_path / "out")


def test_formats_have_titles() -> None:
    assert list(FORMATS) == list(TITLES) == list(COMMAND_FORMATS)


def test_coco_is_not_another_format(tmp_path: Path) -> None:
    write(tmp_path / "train.json", {"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1}]})
    assert recognise(tmp_path / "train.json") == "coco" and hint(tmp_path / "train.json") == ""
    assert recognise(tmp_path / "missing") is None
