"""Folders of label PNGs in the layouts of ADE20K, Cityscapes, CamVid and COCO-Stuff, and unusable ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from giantdet.config.classes import unique_names
from giantdet.config.datasets import SemanticPngDatasetConfig
from giantdet.data.dataset import open_dataset
from giantdet.data.semantic_png import SemanticPngDataset
from giantdet.errors import DataError
from giantdet.structures import IGNORE

SIZE = (6, 8)  # height, width


def opened(folder: Path, **keys: Any) -> SemanticPngDataset:
    section = {"format": "semantic_png", "images": str(folder / "images"), "labels": str(folder / "labels")}
    found = open_dataset(SemanticPngDatasetConfig.model_validate(section | keys))
    assert isinstance(found, SemanticPngDataset)
    return found


def write(folder: Path, image: str, label: str, labels: Image.Image | NDArray[Any]) -> None:
    """Write one image with its labels."""
    picture = labels if isinstance(labels, Image.Image) else Image.fromarray(labels)
    for path in (folder / "images" / image, folder / "labels" / label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", picture.size, (90, 60, 30)).save(folder / "images" / image)
    picture.save(folder / "labels" / label)


def some_labels(values: list[int], dtype: Any = np.uint8, seed: int = 0) -> NDArray[Any]:
    """Return a map that contains every value."""
    rng = np.random.default_rng(seed)
    found = rng.choice(values, SIZE).astype(dtype)
    found.ravel()[: len(values)] = values
    return found


def test_ade20k(shared: Path, tmp_path: Path) -> None:
    """The sample's labels are reduced already; a copy as shipped gives the same with `reduce_zero_label`."""
    folder = shared / "data/ade20k_sample3"
    names = [
        c["name"] for c in json.loads((folder / "annotations/semantic_val.json").read_text())["categories"]
    ]
    own = {"images": str(folder / "images"), "classes": str(folder / "annotations/semantic_val.json")}
    reduced = opened(tmp_path, **own, labels=str(folder / "annotations/semantic_val"))
    assert len(reduced) == 3 and [name for _, name in reduced.classes.semantic] == names
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    table += "".join(f"{n}\t0.1\t1\t1\t0\t{name.replace(';', ', ')}\n" for n, name in enumerate(names, 1))
    (tmp_path / "objectInfo150.txt").write_text(table)
    original = opened_as_shipped(folder, tmp_path)
    short = [name.split(";")[0] for name in names]
    assert [name for _, name in original.classes.semantic] == short
    assert len(set(short)) < len(set(unique_names(original.classes.semantic))) == 150
    for i in range(3):
        file = folder / "annotations/semantic_val" / f"{reduced.path(i).stem}.png"
        expected = np.array(Image.open(file))
        assert (reduced.semantic_map(i) == expected).all() and (expected == IGNORE).any()
        assert (original.semantic_map(i) == expected).all()
        assert reduced.read_image(i).shape[:2] == expected.shape == tuple(reduced.sizes_hw[i])


def opened_as_shipped(folder: Path, copy: Path) -> SemanticPngDataset:
    """Open ADE20K's sample with 0 for other objects and classes from 1, as it is shipped."""
    (copy / "labels").mkdir()
    for file in (folder / "annotations/semantic_val").iterdir():
        labels = np.array(Image.open(file))
        Image.fromarray(np.where(labels == IGNORE, 0, labels + 1).astype(np.uint8)).save(
            copy / "labels" / file.name
        )
    keys = {"classes": str(copy / "objectInfo150.txt"), "reduce_zero_label": True}
    return opened(copy, images=str(folder / "images"), **keys)


def test_cityscapes(tmp_path: Path) -> None:
    """Suffixes, a subfolder per city, and classes with trainId 255 or -1; the ids are not changed."""
    labels = some_labels([0, 1, 255])
    for n, city in enumerate(("aachen", "ulm")):
        name = f"{city}/{city}_0000{n}_000019"
        write(tmp_path, f"{name}_leftImg8bit.png", f"{name}_gtFine_labelTrainIds.png", labels + 0)
        write(tmp_path, f"{name}_rightImg8bit.png", f"{name}_gtFine_labelIds.png", some_labels([7, 8]))
    classes = [
        {"name": "unlabeled", "id": 0, "trainId": 255},
        {"name": "road", "id": 7, "trainId": 0},
        {"name": "sidewalk", "id": 8, "trainId": 1},
        {"name": "license plate", "id": -1, "trainId": -1},
    ]
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    keys = {"image_suffix": "_leftImg8bit", "label_suffix": "_gtFine_labelTrainIds"}
    dataset = opened(tmp_path, **keys, classes=str(tmp_path / "classes.json"))
    assert [dataset.path(i).parent.name for i in range(len(dataset))] == ["aachen", "ulm"]
    assert dataset.classes.semantic == ((0, "road"), (1, "sidewalk"))
    assert (dataset.semantic_map(1) == labels).all()


def test_camvid(tmp_path: Path) -> None:
    """Labels are colours, one of which is not trained; alpha is ignored."""
    colors = np.array([(64, 128, 64), (192, 0, 128), (0, 0, 0)], np.uint8)
    labels = some_labels([0, 1, 2])
    write(tmp_path, "0001TP.jpg", "0001TP_L.png", colors[labels])
    rgba = np.concatenate([colors[labels], some_labels([7, 99])[..., None]], -1)
    write(tmp_path, "0002TP.jpg", "0002TP_L.png", rgba)
    (tmp_path / "label_colors.txt").write_text("64 128 64\tAnimal\n192 0 128\tArchway\n0 0 0\tVoid\n")
    keys = {"label_suffix": "_L", "classes": str(tmp_path / "label_colors.txt"), "ignore": ["Void"]}
    dataset = opened(tmp_path, **keys)
    assert dataset.classes.semantic == ((0, "Animal"), (1, "Archway"))
    for i in range(2):
        assert (dataset.semantic_map(i) == np.where(labels == 2, IGNORE, labels)).all()


def test_coco_stuff(tmp_path: Path) -> None:
    """Ids with gaps become classes in the order of the list."""
    write(tmp_path, "1.jpg", "1.png", some_labels([92, 181, 255]))
    (tmp_path / "stuff.json").write_text(
        json.dumps([{"id": 92, "name": "banner"}, {"id": 181, "name": "wood"}])
    )
    dataset = opened(tmp_path, classes=str(tmp_path / "stuff.json"))
    table = np.zeros(256, int)
    table[[92, 181, 255]] = (0, 1, IGNORE)
    assert (dataset.semantic_map(0) == table[some_labels([92, 181, 255])]).all()
    assert dataset.classes.semantic == ((92, "banner"), (181, "wood"))


def palette() -> Image.Image:
    """Return class numbers under a palette that shows other colours, as in VOC."""
    image = Image.fromarray(some_labels([0, 1, 2]), "P")
    image.putpalette([9, 9, 9, 128, 0, 0, 0, 128, 0] + [0] * 759)
    return image


PIXELS: dict[str, Callable[[], Image.Image]] = {
    "grey": lambda: Image.fromarray(some_labels([0, 1, 2])),
    "palette": palette,
    "16 bits": lambda: Image.fromarray(some_labels([0, 1, 2], np.uint16)),
    "grey with alpha": lambda: Image.merge(
        "LA", [Image.fromarray(some_labels(v)) for v in ([0, 1, 2], [7, 9])]
    ),
}


@pytest.mark.parametrize("kind", PIXELS)
def test_kinds_of_png(kind: str, tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "a.png", PIXELS[kind]())
    dataset = opened(tmp_path, classes=["x", "y", "z"])
    assert (dataset.semantic_map(0) == some_labels([0, 1, 2])).all()
    assert len(dataset.objects(0)) == 0 and dataset.panoptic_map(0) is None
    assert dataset.training_indices(True).tolist() == [0]


def test_labels_beyond_8_bits(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "a.png", some_labels([1000, 26_001, 65_535], np.uint16))
    classes = [{"name": "x", "id": 26_001}, {"name": "y", "id": 1000}]
    (tmp_path / "c.json").write_text(json.dumps(classes))
    found = opened(tmp_path, classes=str(tmp_path / "c.json"), ignore=[65_535]).semantic_map(0)
    labels = some_labels([1000, 26_001, 65_535], np.uint16)
    assert (found == np.select([labels == 26_001, labels == 1000], [0, 1], IGNORE)).all()


def test_images_without_labels_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abc":
        write(tmp_path, f"{name}.jpg", f"{name}.png", some_labels([0, 1]))
    (tmp_path / "labels/b.png").unlink()
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        dataset = opened(tmp_path, classes=["x", "y"])
    assert [dataset.path(i).name for i in range(len(dataset))] == ["a.jpg", "c.jpg"]
    assert "left out 1 of 3 images without a label map, e.g. b.jpg (no b.png)" in caplog.text


def test_nothing_matches(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "a_gt.png", some_labels([0, 1]))
    message = (
        "no label map belongs to one of the 1 images in .*, e.g. a.jpg would need a.png; "
        "see image_suffix and label_suffix"
    )
    with pytest.raises(DataError, match=message):
        opened(tmp_path, classes=["x", "y"])
    (tmp_path / "images/a.jpg").unlink()
    with pytest.raises(DataError, match=r"one of the 0 images in .*images; see"):
        opened(tmp_path, classes=["x", "y"])


def test_broken_files(tmp_path: Path) -> None:
    """Broken files are named: an unreadable header at once, the rest when the file is read."""
    for name in "ab":
        write(tmp_path, f"{name}.jpg", f"{name}.png", some_labels([0, 1]))
    dataset = opened(tmp_path, classes=["x", "y"])
    file = tmp_path / "labels/b.png"
    content = file.read_bytes()
    for broken in (content[:45], content[:45] + b"\0" * 60):
        file.write_bytes(broken)
        with pytest.raises(DataError, match=r"labels/b\.png: "):
            dataset.semantic_map(1)
    file.write_bytes(content[:10])
    with pytest.raises(DataError, match=r"labels/b\.png: cannot identify image file"):
        opened(tmp_path, classes=["x", "y"])


def test_an_image_of_another_size_and_an_unknown_label(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path, f"{name}.jpg", f"{name}.png", some_labels([0, 7]))
    Image.new("RGB", (9, 9)).save(tmp_path / "images/b.jpg")
    dataset = opened(tmp_path, classes=["x", "y"])
    with pytest.raises(DataError, match=r"b\.jpg: the file is 9 x 9, its record says 8 x 6"):
        dataset.read_image(1)
    message = r"labels/a\.png: label 7 is none of the 2 classes .*; see ignore and reduce_zero_label"
    with pytest.raises(DataError, match=message):
        dataset.semantic_map(0)


def test_errors_of_the_classes_name_the_folder(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "a.png", some_labels([0, 1]))
    with pytest.raises(DataError, match=r"labels: ignore: no class is called 'z'"):
        opened(tmp_path, classes=["x", "y"], ignore=["z"])
    with pytest.raises(DataError, match=r"labels: cannot read the classes .*no\.txt: No such file"):
        opened(tmp_path, classes=str(tmp_path / "no.txt"))
