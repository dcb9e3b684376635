"""Pascal VOC: one XML file an image.

Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html. Pixels are counted from 1 and
`xmax`, `ymax` are the last pixels inside, so the box in coordinates is xmin - 1, ymin - 1, xmax, ymax (as in
detectron2). A `difficult` object is neither counted as missed nor, if it is found, as wrong in VOC's own
evaluation; in COCO's terms it is ignored. Polygons (`x1`, `y1`, `x2`, ...) are an extension of other tools;
their points are counted from 1 too.

supervision's reader is not used: it decodes every image, keeps a full bitmap of each polygon, and leaves out
`difficult`, splits and the names of bad files. tests/data/test_importing_library.py compares with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

from giantdet.data.importing.documents import name_in, read_xml, roots
from giantdet.data.importing.scene import (
    Notes,
    Picture,
    Points,
    Request,
    Shape,
    is_image,
    locate,
    number,
    size_of,
)
from giantdet.errors import DataError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_LISTS = {"trainval": "train", "train": "train", "val": "val", "test": "test"}  # a later one takes precedence
_POINT = re.compile(r"([xy])(\d+)")


def read_voc(request: Request, notes: Notes) -> Iterator[Picture]:
    """Yield the pictures of a VOC folder (Annotations, JPEGImages, ImageSets), or of any folder of XML."""
    base = _base(request.source)
    request_xml = Request(base / "Annotations" if (base / "Annotations").is_dir() else request.source)
    splits = _splits(base)
    if (base / "SegmentationObject").is_dir():
        notes.note("masks that are not read", "SegmentationObject", "objects have their boxes alone")
    used: set[Path] = set()
    folders: list[Path] = [request.images] if request.images else [base / "JPEGImages"]
    for path, where, root in roots(request_xml, ".xml", notes, read_xml):
        if root.tag != "annotation":
            notes.skip("not a VOC file", where, f"its root is <{root.tag}>, not <annotation>")
            continue
        name = (root.findtext("filename") or "").strip() or path.stem
        # The XML file's own name comes first: tools rename files and leave <filename> as it was.
        own = _beside(path, [*folders, path.parent])
        file = own or locate(name, [*folders, path.parent], notes, where)
        if file is not None:
            used.add(file)
        if splits and path.stem not in splits:
            notes.skip("image in no split list", where, "it is in none of ImageSets/Main/train, val, test")
            continue
        picture = Picture(file, where, name, size=_size(root), split=splits.get(path.stem))
        picture.shapes.extend(_shapes(root, where, request, notes))
        yield picture
    _unannotated(request, used, notes)


def _base(source: Path) -> Path:
    """Return the folder that has Annotations: the source, the one above it, or VOCdevkit's only year."""
    if source.name == "Annotations" and source.is_dir():
        return source.parent
    years = sorted(source.glob("VOC*/Annotations")) + sorted(source.glob("VOCdevkit/VOC*/Annotations"))
    if len(years) > 1 and not (source / "Annotations").is_dir():
        found = ", ".join(str(year.parent.relative_to(source)) for year in years)
        raise DataError(f"{source} has several data sets ({found}); import them one by one")
    return years[0].parent if years and not (source / "Annotations").is_dir() else source


def _splits(base: Path) -> dict[str, str]:
    """Return the split of each image's stem, of the lists in ImageSets/Main."""
    found: dict[str, str] = {}
    for name, split in _LISTS.items():
        path = base / "ImageSets/Main" / f"{name}.txt"
        if path.is_file():
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            found |= {line.split()[0]: split for line in lines if line.strip()}
    return found


def _beside(xml: Path, folders: list[Path]) -> Path | None:
    for folder in folders:
        for ending in (".jpg", ".png", ".jpeg", ".JPG", ".bmp", ".tif", ".webp"):
            if (folder / f"{xml.stem}{ending}").is_file():
                return folder / f"{xml.stem}{ending}"
    return None


def _size(root: Element) -> tuple[int, int] | None:
    return size_of(root.findtext("size/height"), root.findtext("size/width"))


def _shapes(root: Element, where: str, request: Request, notes: Notes) -> Iterator[Shape]:
    shift = 0.0 if request.zero_based else 1.0
    for n, element in enumerate(root.iterfind("object"), 1):
        place = f"{where} object {n}"
        name = (element.findtext("name") or "").strip()
        difficult = (element.findtext("difficult") or "0").strip() in ("1", "true", "True")
        if difficult and request.difficult == "ignore":
            notes.note("difficult object, now ignored (neither trained nor scored)", place, name)
        try:
            x0, y0, x1, y1 = (number(element.findtext(f"bndbox/{key}")) for key in _CORNERS)
            polygons = [_polygon(part, shift) for part in element.iterfind("polygon")]
        except ValueError as error:
            notes.skip("bad box", place, f"{name}: bndbox or polygon: {error}")
            continue
        if min(x0, y0) < 1 and not request.zero_based:
            text = f"xmin {x0:g}, ymin {y0:g}; if all pixels are counted from 0, use --zero-based"
            notes.note("box from pixel 0 where VOC begins with 1", place, text)
        box = (max(x0 - shift, 0.0), max(y0 - shift, 0.0), x1, y1)
        yield Shape(name, place, box, polygons, ignore=difficult and request.difficult == "ignore")


def _polygon(element: Element, shift: float) -> Points:
    """Return the points of `x1`, `y1`, `x2`, ..., in the order of their numbers."""
    values: dict[int, dict[str, float]] = {}
    for child in element:
        if found := _POINT.fullmatch(child.tag):
            values.setdefault(int(found[2]), {})[found[1]] = number(child.text) - shift
    if any(len(point) != 2 for point in values.values()):
        raise ValueError("a point has x or y alone")
    return [values[n][axis] for n in sorted(values) for axis in "xy"]


def _unannotated(request: Request, used: set[Path], notes: Notes) -> None:
    """Count the images without an XML file, which nobody has looked at."""
    for folder in sorted({path.parent for path in used}):
        for path in sorted(folder.iterdir()):
            if path not in used and is_image(path):
                notes.skip("image without annotations", name_in(request, path))
