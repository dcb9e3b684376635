"""COCO instances JSONs themselves: to divide one into splits, or to join the folders of an exporter.

Records are read as training reads them (`data/reading.py`), so that what it would leave out is counted here.
Exporters write a folder a split with the JSON beside the images (train/_annotations.coco.json).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from giantdet.data.importing.documents import files, name_in
from giantdet.data.importing.scene import Notes, Picture, Request, Shape, compressed, locate, split_name
from giantdet.data.reading import Records, read_records
from giantdet.data.records import read_instances
from giantdet.errors import DataError

_SPLITS = ("train", "valid", "val", "test")


def read_coco(request: Request, notes: Notes) -> Iterator[Picture]:
    """Yield the pictures of a COCO JSON, or of all in a folder."""
    paths = files(request, ".json")
    found: list[tuple[Path, Records]] = []
    for path in paths:
        try:
            found.append((path, read_records(path, read_instances(path), keep_findings=True)))
        except DataError as error:
            if len(paths) == 1:
                raise
            notes.skip("unreadable file", name_in(request, path), str(error))
    for path, records in found:
        where = name_in(request, path)
        for finding in records.findings or ():
            add = notes.skip if finding.left_out else notes.note
            add(finding.kind, f"{where} {finding.what} {finding.name}", finding.text)
        for _, name in sorted(records.categories.items()):
            notes.list_class(name)
        split = _split(path) if len(found) > 1 else None
        yield from _pictures(path, records, where, split, request, notes)


def _split(path: Path) -> str | None:
    """Return the split that the name of a file or its folder tells."""
    for name in (path.parent.name, path.stem):
        words = name.lower().replace("-", "_").split("_")
        for split in _SPLITS:
            if any(word.startswith(split) for word in words):
                return split_name(split)
    return None


def _pictures(
    path: Path, records: Records, where: str, split: str | None, request: Request, notes: Notes
) -> Iterator[Picture]:
    shapes: dict[int, list[Shape]] = {number: [] for number in records.images}
    for record in records.annotations:
        x, y, w, h = (float(value) for value in record["bbox"])
        segmentation = record.get("segmentation") or []
        rle = compressed(segmentation) if isinstance(segmentation, dict) else None
        shapes[record["image_id"]].append(
            Shape(
                records.categories[record["category_id"]],
                f"{where} annotation {record.get('id')}",
                box=(x, y, x + w, y + h),
                polygons=[] if rle is not None else segmentation,
                rle=rle,
                crowd=bool(record.get("iscrowd")),
                ignore=bool(record.get("ignore")),
            )
        )
    folders = [request.images] if request.images else [path.parent, path.parent / "images"]
    for number, record in records.images.items():
        place = f"{where} image {number}"
        file = locate(record["file_name"], folders, notes, place)
        size = (record["height"], record["width"])
        yield Picture(file, place, record["file_name"], shapes[number], size, split=split)
