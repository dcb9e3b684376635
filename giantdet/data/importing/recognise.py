"""Tell by a first look which other format a file or folder is in.

Light and without other parts of giantdet, so that errors about annotations can name the command to run.
"""

from __future__ import annotations

import csv
import itertools
import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

_LOOKED_AT = 2000  # files of a folder
_START = 4096  # bytes of an XML file
_SUFFIXES = (".yaml", ".yml", ".xml", ".json", ".csv", ".txt")  # in the order in which they decide
_LARGEST = 64 * 2**20  # bytes of a JSON that is read for a look


def recognise(source: Path) -> str | None:
    """Return the name of the format of a file or folder, or None. Reads a few files of a folder."""
    try:
        if source.is_file():
            return _of_file(source)
        if not source.is_dir():
            return None
        if next(source.glob("*/masks/*"), None) and next(source.glob("*/images/*"), None):
            return "masks"
        found = list(_files(source))
        names = {path.name for path in found}
        for path in _some_of_each(found):
            if name := _of_file(path):
                return name
        if names & {"classes.txt", "obj.names", "_darknet.labels"}:
            return "yolo"
        masks = ("PedMasks", "masks", "instances")
        return "masks" if any((source / name).is_dir() for name in masks) else None
    except (OSError, ValueError, RecursionError):
        return None


def hint(path: str | Path) -> str:
    """Return the end of a message about annotations that are not in COCO's format, or ""."""
    name = recognise(Path(path))
    if name in (None, "coco"):
        return ""
    assert name is not None
    command = f"giantdet import-data {name} {shlex.quote(str(path))} OUT"
    return f"; this looks like {TITLES[name]}: `{command}` makes a COCO JSON of it"


def _files(folder: Path) -> Iterator[Path]:
    """Yield files of a folder and its sub-folders, at most `_LOOKED_AT` of each folder."""
    entries = sorted(itertools.islice(folder.iterdir(), _LOOKED_AT))
    yield from (path for path in entries if path.is_file())
    for path in [path for path in entries if path.is_dir() and not path.name.startswith(".")][:50]:
        yield from (child for child in itertools.islice(path.iterdir(), _LOOKED_AT) if child.is_file())
        deeper = [child for child in itertools.islice(path.iterdir(), 50) if child.is_dir()]
        for child in deeper:
            yield from (leaf for leaf in itertools.islice(child.iterdir(), 50) if leaf.is_file())


def _some_of_each(paths: Iterable[Path]) -> Iterator[Path]:
    for suffix in _SUFFIXES:
        yield from [path for path in paths if path.suffix.lower() == suffix][:5]


def _of_file(path: Path) -> str | None:
    suffix = path.suffix.lower()
    look = _LOOKS.get(suffix)
    return look(path) if look is not None else None


def _of_xml(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(_START)
    if b"<annotations" in start:
        return "cvat"
    return "voc" if b"<annotation" in start else None


def _of_json(path: Path) -> str | None:
    if path.stat().st_size > _LARGEST:
        return None
    content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, list):
        task = content[0] if content and isinstance(content[0], dict) else {}
        is_task = isinstance(task.get("data"), dict) and bool({"annotations", "completions"} & set(task))
        return "label-studio" if is_task else None
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("shapes"), list) and ("imagePath" in content or "imageData" in content):
        return "labelme"
    if all(isinstance(content.get(key), list) for key in ("images", "annotations", "categories")):
        return "coco"
    entries = content.get("_via_img_metadata", content)
    first = next(iter(entries.values()), None) if isinstance(entries, dict) else None
    return "via" if isinstance(first, dict) and {"regions", "filename"} <= set(first) else None


def _of_yaml(path: Path) -> str | None:
    text = f"\n{path.read_text(encoding='utf-8-sig')}"
    return "yolo" if "\nnames:" in text and ("\ntrain:" in text or "\nnc:" in text) else None


def _of_text(path: Path) -> str | None:
    with path.open(encoding="utf-8") as file:
        words = file.readline().split()
    values = [float(word) for word in words[1:]] if words and words[0].isdigit() else []
    return "yolo" if len(values) >= 4 and all(-0.01 <= value <= 1.01 for value in values) else None


def _of_csv(path: Path) -> str | None:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file), [])
    return "open-images" if {"ImageID", "LabelName", "XMin"} <= set(header) else None


_LOOKS: dict[str, Callable[[Path], str | None]] = {
    ".xml": _of_xml,
    ".json": _of_json,
    ".yaml": _of_yaml,
    ".yml": _of_yaml,
    ".txt": _of_text,
    ".csv": _of_csv,
}
TITLES = {
    "voc": "Pascal VOC",
    "yolo": "YOLO",
    "labelme": "labelme",
    "via": "VIA",
    "cvat": "CVAT XML",
    "label-studio": "Label Studio JSON",
    "open-images": "Open Images CSV",
    "masks": "a folder of masks",
    "coco": "COCO JSON",
}
"""The formats of `giantdet import-data`, as they are called in messages."""
