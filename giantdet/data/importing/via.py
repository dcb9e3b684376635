"""VGG Image Annotator, versions 1 and 2: one JSON file of all images, with regions in pixels.

A project (`_via_img_metadata`) and an export of annotations are read. The class is an attribute of the
region, whose name is the annotator's own. Format: https://www.robots.ox.ac.uk/~vgg/software/via/, the JSON
export.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from giantdet.data.importing.documents import name_in, read_json
from giantdet.data.importing.scene import Notes, Picture, Request, Shape, ellipse, locate, number
from giantdet.errors import DataError

_USUAL = ("class", "label", "name", "category", "type", "object")
_LINES = ("polyline", "point", "line")


def read_via(request: Request, notes: Notes) -> Iterator[Picture]:
    """Yield the pictures of a VIA JSON, or of all in a folder (such as train/via_region_data.json)."""
    paths = [request.source] if request.source.is_file() else sorted(request.source.rglob("*.json"))
    found = [(path, entries) for path in paths if (entries := entries_of(read_json(path))) is not None]
    if not found:
        raise DataError(f"{request.source} has no VIA annotations: no entries with filename and regions")
    attribute = request.attribute or _attribute([entry for _, entries in found for entry in entries], notes)
    for path, entries in found:
        split = path.parent.name if path.parent.name in ("train", "val", "test") else None
        for entry in entries:
            name = str(entry.get("filename"))
            where = f"{name_in(request, path)} {name}"
            folders = [request.images] if request.images else []
            file = locate(name, [*folders, path.parent, path.parent / "images"], notes, where)
            picture = Picture(file, where, name, split=split if len(found) > 1 else None)
            picture.shapes = list(_shapes(entry["regions"], where, attribute, request, notes))
            yield picture


def entries_of(content: Any) -> list[dict[str, Any]] | None:
    """Return the entries of the images in a JSON's content, or None if it is not VIA's. Raises DataError."""
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("project"), dict) and "metadata" in content and "view" in content:
        raise DataError("a project of VIA 3 is not supported; VIA 1 and 2 are")
    entries = content.get("_via_img_metadata", content)
    values = list(entries.values()) if isinstance(entries, dict) else []
    are_good = all(isinstance(value, dict) and {"regions", "filename"} <= set(value) for value in values)
    return values if values and are_good else None


def _regions(regions: Any) -> list[Any]:
    """Return the regions of an entry, which are a list in version 2 and an object in version 1."""
    values = list(regions.values()) if isinstance(regions, dict) else regions
    return values if isinstance(values, list) else []


def _attribute(entries: list[dict[str, Any]], notes: Notes) -> str | None:
    """Return the region attribute that names the class; None: regions have no attributes."""
    used: Counter[str] = Counter()
    for entry in entries:
        for region in _regions(entry["regions"]):
            if isinstance(region, dict) and isinstance(region.get("region_attributes"), dict):
                used.update(
                    key for key, value in region["region_attributes"].items() if value not in ("", {})
                )
    usual = [key for key, _ in used.most_common() if key.lower() in _USUAL]
    chosen = next(iter(used if len(used) == 1 else usual), None)
    if used and chosen is None:
        raise DataError(
            f"which region attribute is the class? Give --attribute, one of {', '.join(sorted(used))}"
        )
    if len(used) > 1:
        notes.note("attribute that names the class", f"{chosen}, of {', '.join(sorted(used))}")
    return chosen


def _shapes(
    regions: Any, where: str, attribute: str | None, request: Request, notes: Notes
) -> Iterator[Shape]:
    for n, region in enumerate(_regions(regions), 1):
        place = f"{where} region {n}"
        try:
            shape = region["shape_attributes"]
            name = _name(region.get("region_attributes"), attribute, request, place, notes)
            if shape["name"] in _LINES:
                notes.skip(f"{shape['name']} region, which is not an object", place)
                continue
            yield _shape(shape, name, place)
        except (KeyError, TypeError, ValueError) as error:
            text = f"no {error}" if isinstance(error, KeyError) else str(error)
            notes.skip("bad region", place, text)


def _name(attributes: Any, attribute: str | None, request: Request, where: str, notes: Notes) -> str:
    if attribute is None:
        notes.note(f"region without attributes, now of the class {request.only_class!r}", where)
        return request.only_class
    value = attributes.get(attribute, "") if isinstance(attributes, dict) else ""
    if isinstance(value, dict):  # a checkbox: the choices that are ticked
        ticked = [key for key, on in value.items() if on]
        value = ticked[0] if len(ticked) == 1 else ""
    return str(value).strip()


def _shape(shape: dict[str, Any], name: str, where: str) -> Shape:
    """Return the shape of a region. Raises KeyError, TypeError or ValueError."""
    kind = shape["name"]
    if kind == "rect":
        x, y, w, h = (number(shape[key]) for key in ("x", "y", "width", "height"))
        return Shape(name, where, box=(x, y, x + w, y + h))
    if kind == "polygon":
        xs, ys = shape["all_points_x"], shape["all_points_y"]
        if len(xs) != len(ys):
            raise ValueError(f"{len(xs)} x and {len(ys)} y")
        return Shape(name, where, polygons=[[number(v) for xy in zip(xs, ys, strict=True) for v in xy]])
    if kind == "circle":
        cx, cy, r = (number(shape[key]) for key in ("cx", "cy", "r"))
        return Shape(name, where, polygons=[ellipse(cx, cy, r, r)])
    if kind == "ellipse":
        cx, cy, rx, ry = (number(shape[key]) for key in ("cx", "cy", "rx", "ry"))
        return Shape(name, where, polygons=[ellipse(cx, cy, rx, ry, _degrees(shape))])
    raise ValueError(f"the shape {kind!r} is not known")


def _degrees(shape: dict[str, Any]) -> float:
    """Return the angle of an ellipse: VIA 2 writes `theta` in radians."""
    return number(shape.get("theta", 0)) * 57.29577951308232
