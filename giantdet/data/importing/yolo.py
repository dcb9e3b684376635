"""YOLO: one text file an image, a line an object, and a data.yaml with the names and splits.

A line is `class x y w h` (a box by its centre) or `class x1 y1 x2 y2 ...` (a polygon of at least 3 points;
the 4 corners of an oriented box are one too); all in 0 to 1 of the image as a viewer shows it. With
`kpt_shape` in data.yaml, keypoints follow a box. An image without a text file, or with an empty one, has no
objects.
Formats: https://docs.ultralytics.com/datasets/detect/, .../segment/, .../obb/, .../pose/.

supervision's reader is not used: it rasterises polygons into full bitmaps that it keeps for all images, ends
at the first bad line, and does not read splits. tests/data/test_importing_library.py compares with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from giantdet.data.importing.documents import name_in
from giantdet.data.importing.scene import (
    Notes,
    Picture,
    Request,
    Shape,
    images_in,
    is_image,
    locate,
    number,
    read_text,
    split_name,
)
from giantdet.errors import DataError

_NAMES = ("classes.txt", "obj.names", "names.txt", "_darknet.labels")
_SPLITS = ("train", "val", "valid", "test")
_SLACK = 0.01  # how far, in parts of the image, coordinates may leave it because of rounding


def read_yolo(request: Request, notes: Notes) -> Iterator[Picture]:
    """Yield the pictures of a data.yaml, or of a folder with images, text files and classes.txt."""
    config_file = _config_file(request.source)
    config = _config(config_file)
    names = _names(config, config_file, request)
    for _, name in sorted(names.items()):
        notes.list_class(name)
    keypoints = _keypoints(config)
    for split, paths in _images(request, config_file, config, notes):
        for path in paths:
            labels = _labels(path)
            picture = Picture(path, name_in(request, path), path.name, relative=True, split=split)
            if labels is None:
                notes.note("image without a text file, as background", picture.where)
            else:
                picture.shapes = list(_shapes(labels, name_in(request, labels), names, keypoints, notes))
            yield picture


def _config_file(source: Path) -> Path | None:
    if source.is_file():
        return source
    for name in ("data.yaml", "dataset.yaml", "data.yml"):
        if (source / name).is_file():
            return source / name
    others = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    return others[0] if len(others) == 1 else None


def _config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a data.yaml: it has no keys such as names and train")
    return content


def _names(config: dict[str, Any], path: Path | None, request: Request) -> dict[int, str]:
    """Return the names of the classes by number."""
    names = config.get("names")
    if isinstance(names, dict) and all(str(key).isdigit() for key in names):
        return {int(key): str(name) for key, name in names.items()}
    if isinstance(names, list) and names:
        return {n: str(name) for n, name in enumerate(names)}
    if path is not None:
        raise DataError(f"{path}: names must be a list of the classes, or an object of them by number")
    for folder in (request.source, request.source / "labels", request.source / "data"):
        for name in _NAMES:
            if (folder / name).is_file():
                lines = read_text(folder / name).splitlines()
                return {n: line.strip() for n, line in enumerate(lines) if line.strip()}
    if request.classes:
        return dict(enumerate(request.classes))
    raise DataError(
        f"{request.source} has no data.yaml and no classes.txt; give the classes in their order: --classes"
    )


def _keypoints(config: dict[str, Any]) -> int:
    """Return how many numbers of keypoints follow a box."""
    shape = config.get("kpt_shape")
    if isinstance(shape, list) and len(shape) == 2 and all(type(v) is int and v > 0 for v in shape):
        return int(shape[0] * shape[1])
    return 0


def _images(
    request: Request, path: Path | None, config: dict[str, Any], notes: Notes
) -> Iterator[tuple[str | None, Sequence[Path]]]:
    """Yield the images of each split."""
    given = {split: config[split] for split in _SPLITS if config.get(split)}
    if path is None or not given:
        folders = {split: request.folder / "images" / split for split in _SPLITS}
        folders |= {s: request.folder / s for s in _SPLITS if (request.folder / s / "images").is_dir()}
        present = {split: folder for split, folder in folders.items() if folder.is_dir()}
        for split, folder in present.items():
            yield split_name(split), images_in(folder)
        if not present:
            yield None, images_in(request.images or request.folder)
        return
    for split, value in given.items():
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, str):
                raise DataError(f"{path}: {split} must be a folder or a list of them, got {entry!r}")
            yield split_name(split), _listed(entry, path, config, notes)


def _listed(entry: str, path: Path, config: dict[str, Any], notes: Notes) -> list[Path]:
    """Return the images of one entry of data.yaml: those of a folder, or of a text file of paths."""
    root = Path(str(config.get("path") or "."))
    bases = [path.parent / root, path.parent, path.parent.parent / root, path.parent.parent]
    # Exporters write "../train/images" from a folder that the user does not have.
    plain = entry.removeprefix("../").removeprefix("./")
    for found in [base / name for name in (entry, plain) for base in bases]:
        if found.is_dir():
            return images_in(found)
        if found.is_file() and is_image(found):
            return [found]
        if found.is_file():
            lines = [line.strip() for line in read_text(found).splitlines() if line.strip()]
            files = [locate(line, [found.parent, *bases], notes, found.name) for line in lines]
            for line, file in zip(lines, files, strict=True):
                if file is None:
                    notes.skip("missing image", found.name, line)
            return [file for file in files if file is not None]
    raise DataError(f"{path}: no folder or file {entry} (beside it, or below its path {root})")


def _labels(image: Path) -> Path | None:
    """Return the text file of an image: in labels/ where the image is in images/, or beside it."""
    parts = list(image.parts)
    at = next((n for n in range(len(parts) - 2, -1, -1) if parts[n] == "images"), None)
    places = [image.with_suffix(".txt")]
    if at is not None:
        places.insert(0, Path(*parts[:at], "labels", *parts[at + 1 :]).with_suffix(".txt"))
    return next((place for place in places if place.is_file()), None)


def _shapes(path: Path, name: str, names: dict[int, str], keypoints: int, notes: Notes) -> Iterator[Shape]:
    try:
        lines = read_text(path).splitlines()
    except DataError as error:
        notes.skip("unreadable file", name, str(error))
        return
    for n, line in enumerate(lines, 1):
        where = f"{name} line {n}"
        if not line.strip():
            continue
        try:
            label, *values = [number(word) for word in line.split()]
            if label not in names:
                notes.skip("unknown class", where, f"class {label:g} is none of the {len(names)} names")
                continue
            if keypoints and len(values) == 4 + keypoints:
                notes.note("keypoints that are not read", where)
                values = values[:4]
            yield _shape(names[int(label)], where, values)
        except ValueError as error:
            notes.skip("bad line", where, str(error))


def _shape(name: str, where: str, values: list[float]) -> Shape:
    """Return the shape of one line. Raises ValueError."""
    if len(values) == 4:
        x, y, w, h = values
        shape = Shape(name, where, box=(x - w / 2, y - h / 2, x + w / 2, y + h / 2))
        if w <= 0 or h <= 0:
            raise ValueError(f"a box of {w:g} x {h:g} has no area")
        low, high = min(shape.box or ()), max(shape.box or ())
    elif len(values) >= 6 and len(values) % 2 == 0:
        shape = Shape(name, where, polygons=[values])
        low, high = min(values), max(values)
    else:
        raise ValueError(
            f"{len(values) + 1} numbers are neither a box (class x y w h) nor a polygon (class x1 y1 ...)"
        )
    if low < -_SLACK or high > 1 + _SLACK:
        raise ValueError(f"coordinates from {low:g} to {high:g} are not in 0 to 1 of the image")
    return shape
