"""Folders of masks, without classes: all objects are of one.

Either one mask file an object, in SOURCE/ID/masks beside SOURCE/ID/images (Data Science Bowl 2018); or one
PNG an image whose pixels are the numbers of objects, 0 the background (PennFudan, Cell Tracking Challenge),
under the image's name, with or without `_mask` behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from giantdet.data.importing.documents import name_in
from giantdet.data.importing.scene import Notes, Picture, Request, Shape, encode, images_in, locate
from giantdet.errors import DataError

_FOLDERS = ("masks", "PedMasks", "labels", "annotations", "gt", "instances")
_ENDS = ("_masks", "_mask", "_instances", "_labels", "_label", "_gt")
_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".JPG")
_MOST = 5000  # objects; an image with more numbers is a photograph


def read_masks(request: Request, notes: Notes) -> Iterator[Picture]:
    """Yield the pictures of a folder of masks."""
    notes.list_class(request.only_class)
    bowls = sorted(path.parent for path in request.source.rglob("masks") if (path.parent / "images").is_dir())
    nested = [folder for folder in bowls if folder != request.source]
    yield from (_one_file_an_object(folder, request, notes) for folder in nested)
    if nested:
        return
    folder = next((request.source / f for f in _FOLDERS if (request.source / f).is_dir()), request.source)
    paths = images_in(folder)
    if not paths:
        raise DataError(f"{folder} has no image files; masks are ID/masks/*.png, or one PNG an image")
    images = request.images or _images_beside(request.source, folder)
    for path in paths:
        yield _numbers(path, images, request, notes)


def _images_beside(source: Path, masks: Path) -> Path:
    for name in ("images", "imgs", "PNGImages", "JPEGImages", "image"):
        for base in (source, masks.parent):
            if (base / name).is_dir():
                return base / name
    raise DataError(f"{source} has no folder images; give the folder of the images with --images")


def _one_file_an_object(folder: Path, request: Request, notes: Notes) -> Picture:
    where = name_in(request, folder)
    images = images_in(folder / "images")
    if len(images) != 1:
        notes.skip("folder without exactly one image", where, f"images has {len(images)}")
        return Picture(None, where, "images/*")
    picture = Picture(images[0], where, images[0].name)
    for path in images_in(folder / "masks"):
        place = name_in(request, path)
        if (mask := _pixels(path, place, notes)) is None:
            continue
        inside = (mask.any(axis=2) if mask.ndim == 3 else mask) != 0
        if not inside.any():
            notes.skip("empty mask", place)
            continue
        picture.shapes.append(Shape(request.only_class, place, rle=encode(inside)))
    return picture


def _numbers(path: Path, images: Path, request: Request, notes: Notes) -> Picture:
    where = name_in(request, path)
    stem = path.stem
    stem = next((stem.removesuffix(end) for end in _ENDS if stem.endswith(end)), stem)
    same = [
        images / f"{stem}{ending}" for ending in (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".JPG")
    ]
    file = next((p for p in same if p.is_file()), None) or locate(f"{stem}.png", [images], notes, where)
    picture = Picture(file, where, stem)
    labels = _pixels(path, where, notes)
    if labels is None:
        return picture
    if labels.ndim == 3:
        notes.note("colours as the numbers of objects", where)
        labels = labels.astype(np.int64) @ np.array([1, 256, 256**2])
    numbers = np.unique(labels)
    numbers = numbers[numbers != 0]
    if len(numbers) > _MOST:
        notes.skip("not a mask", where, f"it has {len(numbers)} different values")
        return picture
    if len(numbers) == 1:
        notes.note("mask with one number, read as one object", where, f"all its pixels are 0 or {numbers[0]}")
    for value in numbers:
        picture.shapes.append(
            Shape(request.only_class, f"{where} value {value}", rle=encode(labels == value))
        )
    return picture


def _pixels(path: Path, where: str, notes: Notes) -> NDArray[np.integer] | None:
    """Return a file's numbers [h, w] or colours [h, w, 3], or None if it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.mode in ("RGBA", "LA", "PA"):  # alpha is not a part of the number
                pixels = np.asarray(image.convert("RGB" if image.mode != "LA" else "L"))
            else:
                pixels = np.asarray(image)
            return pixels if image.mode == "RGB" else pixels.astype(np.int64)
    except Exception as error:  # PIL's plugins raise any exception on broken files
        notes.skip("unreadable file", where, f"{type(error).__name__} {error}")
        return None
