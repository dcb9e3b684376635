"""Make COCO instances JSONs of the pictures that a reader yields: one a split, with what was left out.

A picture is kept if its file is there and has the size that its source states. Boxes are clipped to the
image; those without area, and objects that are written twice, are left out. `area` is that of the mask, or of
the box. Categories are numbered from 1: in the source's order where it lists them, else by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from pycocotools import mask as mask_util
from tqdm import tqdm

from giantdet.data.images import named
from giantdet.data.importing.formats import FORMATS
from giantdet.data.importing.recognise import TITLES, recognise
from giantdet.data.importing.scene import Notes, Picture, Request, Shape
from giantdet.data.reading import read_records
from giantdet.data.segments import Size, polygon_fault, segment_box
from giantdet.data.summary import Summary, summarize
from giantdet.errors import DataError, InputError

_ORIENTATION = 0x0112  # EXIF tag
_OVERHANG = 1.0  # pixels that a box may leave the image by without being counted


@dataclass(frozen=True)
class Split:
    """How images are divided where the source has no validation set."""

    val_share: float | None = None
    seed: int = 0


@dataclass
class Imported:
    """What was written."""

    format: str
    images: Path
    """The folder that file names are relative to."""
    files: dict[str, Path] = field(default_factory=dict)
    """The COCO JSON of each split."""
    summaries: dict[str, Summary] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)

    def text(self) -> str:
        """Return the summary of each file, and what was left out or read otherwise."""
        lines = [f"read as {TITLES[self.format]}; the images are in {self.images}"]
        for split, path in self.files.items():
            lines.append(self.summaries[split].text(str(path)))
        return "\n".join([*lines, *self.notes.lines()])


@dataclass
class _Entry:
    """A picture with its size and objects, before it has an id."""

    file: Path
    size: Size
    split: str | None
    objects: list[tuple[str, dict[str, Any]]]


def convert(
    name: str,
    request: Request,
    output: Path,
    split: Split = Split(),  # frozen
    copy: bool = False,
    overwrite: bool = False,
) -> Imported:
    """Write the COCO JSONs of a data set in another format to `output`, and return what they hold.

    `name`: one of `FORMATS`, or "auto". `copy`: images are copied to `output`/images, else they stay where
    they are. Raises DataError or InputError.
    """
    name = _format(name, request.source)
    existing = sorted(path.name for path in output.glob("*.json")) if output.is_dir() else []
    if existing and not overwrite:
        raise InputError(f"{output} has {existing[0]} already; name a new folder, or add --overwrite")
    if name == "coco" and output.absolute() in (request.source.absolute(), request.source.absolute().parent):
        raise InputError(f"{output} has the source {request.source} in it; name another folder")
    notes = Notes()
    pictures = tqdm(FORMATS[name](request, notes), unit="image", disable=None, leave=False)  # on terminals
    entries = list(_entries(pictures, request, notes))
    if not entries:
        example = next((texts[0] for texts in notes.examples.values()), "it has no pictures")
        raise DataError(f"{request.source}: no image can be used as {TITLES[name]}, e.g. {example}")
    splits = _split(entries, split)
    root = _root(entries, request)
    categories = _categories(entries, request, notes)
    imported = Imported(name, output / "images" if copy else root, notes=notes)
    output.mkdir(parents=True, exist_ok=True)
    info = {
        "description": f"imported from {TITLES[name]}: {request.source}",
        "images": os.path.abspath(imported.images),
    }
    for part, chosen in splits.items():
        content = _content(chosen, categories, root)
        path = output / f"{part}.json"
        imported.summaries[part] = summarize(read_records(path, content))
        imported.files[part] = path
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps({"info": info, **content}))
        os.replace(temporary, path)
        for entry in chosen if copy else ():
            target = imported.images / entry.file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(entry.file, target)
    return imported


def _format(name: str, source: Path) -> str:
    if not source.exists():
        raise DataError(f"{source} does not exist")
    if name != "auto":
        return name
    found = recognise(source)
    if found is None:
        raise InputError(f"{source}: its format is not recognised; name it, one of {', '.join(FORMATS)}")
    return found


def _entries(pictures: Iterable[Picture], request: Request, notes: Notes) -> Iterator[_Entry]:
    """Yield the pictures whose file can be used, each once."""
    used: set[Path] = set()
    for picture in pictures:
        if picture.file is None:
            notes.skip("missing image", picture.where, picture.name)
            continue
        file = Path(os.path.abspath(picture.file))
        if file in used:
            notes.skip("image that is described twice", picture.where, file.name)
            continue
        try:
            size = _size(file, picture, notes)
        except DataError as error:
            notes.skip("unusable image", picture.where, str(error))
            continue
        used.add(file)
        objects, seen = [], set()
        for shape in picture.shapes:
            record = _record(shape, size, picture.relative, request, notes)
            if record is None:
                continue
            key = json.dumps([shape.name, record], sort_keys=True)
            if key in seen:
                notes.skip("object that is written twice", shape.where, shape.name)
                continue
            seen.add(key)
            objects.append((shape.name, record))
        yield _Entry(file, size, picture.split, objects)


def _size(file: Path, picture: Picture, notes: Notes) -> Size:
    """Return the size that a picture's coordinates are in. Raises DataError.

    It is the stated one if the file has it as it is stored or as EXIF turns it. Without a statement it is
    that of the turned file, as label tools and browsers show it.
    """
    with named(file), Image.open(file) as image:
        stored = (image.height, image.width)
        turned = stored[::-1] if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8) else stored
    if picture.size is None:
        return turned
    if picture.size in (turned, stored):
        return picture.size
    stated = f"{picture.size[1]} x {picture.size[0]}"
    real = f"{turned[1]} x {turned[0]}"
    if picture.relative or picture.size == turned[::-1]:
        notes.note("image of another size than stated", picture.where, f"{real}, not {stated}")
        return turned
    raise DataError(f"it is {real}, and its annotations are for {stated}")


def _record(
    shape: Shape, size: Size, relative: bool, request: Request, notes: Notes
) -> dict[str, Any] | None:
    """Return an object's part of a COCO annotation, or None if it is left out."""
    if not shape.name:
        notes.skip("object without a class", shape.where)
        return None
    if request.classes is not None and shape.name not in request.classes:
        notes.skip("object of a class that is not in --classes", shape.where, shape.name)
        return None
    scale = (size[1], size[0]) if relative else (1, 1)
    segmentation, box = _segmentation(shape, size, scale, notes)
    if box is None and shape.box is not None:
        box = [value * scale[n % 2] for n, value in enumerate(shape.box)]
    if box is None:
        notes.skip("object without a usable shape", shape.where, shape.name)
        return None
    x0, y0, x1, y1 = box
    if x1 <= x0 or y1 <= y0:
        notes.skip("empty box", shape.where, f"{shape.name} {x0:g}, {y0:g} to {x1:g}, {y1:g}")
        return None
    inside = [max(x0, 0), max(y0, 0), min(x1, size[1]), min(y1, size[0])]
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        text = f"{shape.name} {x0:g}, {y0:g} to {x1:g}, {y1:g} of {size[1]} x {size[0]}"
        notes.skip("box outside the image", shape.where, text)
        return None
    if max(abs(a - b) for a, b in zip(inside, box, strict=True)) > _OVERHANG:
        notes.note("box clipped to the image", shape.where, f"{shape.name} {x0:g}, {y0:g} to {x1:g}, {y1:g}")
    x0, y0, x1, y1 = (round(value, 4) for value in inside)
    bbox = [x0, y0, round(x1 - x0, 4), round(y1 - y0, 4)]
    record: dict[str, Any] = {"bbox": bbox, "iscrowd": int(shape.crowd), "area": bbox[2] * bbox[3]}
    if segmentation:
        record["segmentation"] = segmentation
        is_rle = isinstance(segmentation, dict)
        rle = segmentation if is_rle else mask_util.merge(mask_util.frPyObjects(segmentation, *size))
        record["area"] = float(mask_util.area(rle))
        if not record["area"]:
            notes.skip("mask without a pixel", shape.where, shape.name)
            return None
    if shape.ignore:
        record["ignore"] = 1
    return record


def _segmentation(shape: Shape, size: Size, scale: tuple[int, int], notes: Notes) -> tuple[Any, Any]:
    """Return COCO's segmentation of a shape and the box x0, y0, x1, y1 around it, or None for each."""
    if shape.rle is not None:
        if tuple(shape.rle["size"]) != size:
            height, width = shape.rle["size"]
            text = f"the mask is {width} x {height}, the image {size[1]} x {size[0]}"
            notes.skip("mask of another size than the image", shape.where, text)
            return None, None
        x, y, w, h = segment_box(shape.rle, size)
        return shape.rle, [x, y, x + w, y + h]
    parts = []
    for polygon in shape.polygons:
        part = [round(value * scale[n % 2], 4) for n, value in enumerate(polygon)]
        if fault := polygon_fault(part):
            notes.skip(fault[0], shape.where, fault[1])
            continue
        parts.append(part)
    if not parts:
        return None, None
    x, y, w, h = segment_box(parts, size)
    return parts, [x, y, x + w, y + h]


def _categories(entries: list[_Entry], request: Request, notes: Notes) -> dict[str, int]:
    """Return the ids of the classes by name."""
    used = sorted({name for entry in entries for name, _ in entry.objects})
    names = list(request.classes) if request.classes is not None else notes.classes
    names = [*dict.fromkeys(names), *(name for name in used if name not in names)]
    if not names:
        raise DataError(f"{request.source}: no object has a class; there is nothing to train on")
    lower = Counter(name.casefold() for name in names)
    for name in names:
        if lower[name.casefold()] > 1:
            notes.note("classes whose names differ in upper and lower case alone", name)
    return {name: number for number, name in enumerate(names, 1)}


def _split(entries: list[_Entry], split: Split) -> dict[str, list[_Entry]]:
    """Return the pictures of each split, train first. Raises InputError.

    The order of a hash of (seed, file name) decides, so that the split does not depend on the order of files,
    and hardly changes where images are added.
    """
    parts: dict[str, list[_Entry]] = {"train": [], "val": []}
    for entry in entries:
        parts.setdefault(entry.split or "train", []).append(entry)
    if split.val_share is not None:
        if parts["val"]:
            raise InputError("the source has a validation set of its own; leave out --val-share")
        order = sorted(
            parts["train"], key=lambda e: hashlib.sha256(f"{split.seed} {e.file.name}".encode()).digest()
        )
        count = min(max(1, round(split.val_share * len(order))), len(order) - 1)
        if count < 1:
            raise InputError("--val-share needs at least 2 images")
        chosen = {id(entry) for entry in order[:count]}
        parts["val"] = [entry for entry in parts["train"] if id(entry) in chosen]
        parts["train"] = [entry for entry in parts["train"] if id(entry) not in chosen]
    return {name: chosen for name, chosen in parts.items() if chosen}


def _root(entries: list[_Entry], request: Request) -> Path:
    """Return the folder that holds all images."""
    if request.images is not None:
        root = Path(os.path.abspath(request.images))
        if all(entry.file.is_relative_to(root) for entry in entries):
            return root
    return Path(os.path.commonpath([entry.file.parent for entry in entries]))


def _content(
    entries: list[_Entry], categories: dict[str, int], root: Path
) -> dict[str, list[dict[str, Any]]]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, entry in enumerate(sorted(entries, key=lambda entry: entry.file), 1):
        height, width = entry.size
        name = entry.file.relative_to(root).as_posix()
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for label, record in entry.objects:
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": categories[label]}
            annotations.append(ids | record)
    names = [{"id": number, "name": name} for name, number in categories.items()]
    return {"images": images, "annotations": annotations, "categories": names}
