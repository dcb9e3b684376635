"""Open Images: a CSV file a split, a row an object, with boxes in 0 to 1 of the image.

`IsGroupOf` is a group of at least five objects in one box: COCO's crowd region. Classes are codes such as
/m/0bt9lr; a file of class descriptions has their names. Only images that are in the folder are read, as few
have all nine million. Format: https://storage.googleapis.com/openimages/web/download_v7.html.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from giantdet.data.importing.documents import name_in
from giantdet.data.importing.scene import Notes, Picture, Request, Shape, images_in, number, split_name
from giantdet.errors import DataError

_NEEDED = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
_SPLITS = ("train", "validation", "test")


def read_open_images(request: Request, notes: Notes) -> Iterator[Picture]:
    """Yield the pictures of a CSV file of boxes, or of all in a folder, whose images are there."""
    tables = [path for path in _csv_files(request.source) if set(_NEEDED) <= set(_header(path))]
    if not tables:
        raise DataError(f"{request.source} has no CSV file with the columns {', '.join(_NEEDED)}")
    names = _descriptions(request)
    files = {path.stem: path for path in images_in(request.images or request.folder)}
    if not files:
        raise DataError(f"{request.images or request.folder} has no images; give their folder with --images")
    for path in tables:
        pictures: dict[str, Picture] = {}
        words = re.split(r"[^a-z]+", path.stem.lower())
        split = split_name(next((name for name in _SPLITS if name in words), None))
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                where = f"{name_in(request, path)} line {reader.line_num}"
                image = row["ImageID"]
                if image not in files:
                    notes.skip("object of an image that is not in the folder", where, image)
                    continue
                picture = pictures.setdefault(
                    image, Picture(files[image], where, image, relative=True, split=split)
                )
                try:
                    picture.shapes.append(_shape(row, names, where, notes))
                except (TypeError, ValueError) as error:
                    notes.skip("bad row", where, str(error))
        yield from pictures.values()


def _csv_files(source: Path) -> list[Path]:
    return [source] if source.is_file() else sorted(source.rglob("*.csv"))


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _descriptions(request: Request) -> dict[str, str]:
    """Return the names of classes by their codes, of the files of class descriptions beside the source."""
    found: dict[str, str] = {}
    for path in sorted(request.folder.rglob("*class-descriptions*.csv")):
        with path.open(encoding="utf-8-sig", newline="") as file:
            found |= {row[0]: row[1] for row in csv.reader(file) if len(row) >= 2 and row[0].startswith("/")}
    return found


def _shape(row: dict[str, str], names: dict[str, str], where: str, notes: Notes) -> Shape:
    """Return the object of a row. Raises TypeError or ValueError."""
    code = row["LabelName"]
    if code not in names:
        notes.note("class without a description, named by its code", where, code)
    group = row.get("IsGroupOf") == "1"
    if group:
        notes.note("IsGroupOf, now a crowd region (iscrowd 1)", where)
    if row.get("IsDepiction") == "1":
        notes.note("IsDepiction (a drawing of an object), now an object", where)
    x0, x1, y0, y1 = (number(row[key]) for key in ("XMin", "XMax", "YMin", "YMax"))
    return Shape(names.get(code, code), where, box=(x0, y0, x1, y1), crowd=group)
