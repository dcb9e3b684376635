"""The images of `giantdet predict`: files, folders with sub-folders, or those that a COCO JSON lists."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from giantdet.data.images import image_endings, read_image
from giantdet.data.records import image_fault
from giantdet.engine.images import load_image
from giantdet.errors import InputError

logger = logging.getLogger("giantdet")


class InputImage(NamedTuple):
    """An image to predict. `size_hw` is that of its record; None: that of the file, rotated by EXIF."""

    number: int
    path: Path
    size_hw: tuple[int, int] | None = None

    def read(self) -> NDArray[np.uint8]:
        """Return the pixels, RGB `[h, w, 3]`. Raises InputError, a ValueError, that names the file."""
        return load_image(self.path) if self.size_hw is None else read_image(self.path, self.size_hw)


def listed_images(annotations: Path, folder: Path) -> list[InputImage]:
    """Return the images of a COCO JSON, whose file names are relative to `folder`, with their own ids.

    Only the list `images` is read: there may be no annotations and no categories. Records that cannot be used
    are counted in warnings. Raises InputError, a ValueError, where no image is left.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; with --annotations, give the folder of its images")
    try:
        content: Any = json.loads(annotations.read_bytes())
    except OSError as error:
        raise InputError(f"{annotations}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{annotations}: not valid JSON: {error}") from error
    records = content.get("images") if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise InputError(f'{annotations}: no list "images", as in a COCO JSON')
    images: dict[int, InputImage] = {}
    skipped: Counter[str] = Counter()
    for record in records:
        if fault := image_fault(record, images):
            skipped[fault[0]] += 1
        else:
            size_hw = (record["height"], record["width"])
            images[record["id"]] = InputImage(record["id"], folder / record["file_name"], size_hw)
    for kind, count in skipped.items():
        logger.warning("%s: skipped %d images (%s)", annotations, count, kind)
    if not images:
        raise InputError(f"{annotations}: no usable image")
    return list(images.values())


def image_files(paths: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Return all image files among paths of files and folders; sub-folders are searched too.

    What is in `output`, the folder of earlier overlays, is left out. Other files of the folders are counted
    in a warning. Raises InputError, a ValueError, for a path that does not exist, and without any image.
    """
    files: list[Path] = []
    others: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            for file in _walk(path, output):
                if file.suffix.lower() in image_endings():
                    files.append(file)
                else:
                    others[file.suffix or "no ending"] += 1
        elif path.exists():
            files.append(path)
        else:
            raise InputError(f"{path}: no such image or folder")
    if not files:
        kinds = ", ".join(sorted(image_endings()))
        raise InputError(f"{paths[0]}: no image in this folder (looked for {kinds}, also in sub-folders)")
    if others:
        kinds = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
        logger.warning("%d files are not read as images: %s", others.total(), kinds)
    return files


def _walk(folder: Path, output: Path | None) -> Iterator[Path]:
    """Yield the files of a folder and its sub-folders, sorted; links are followed, each folder once."""
    seen = set() if output is None else {os.path.realpath(output)}
    seen.discard(os.path.realpath(folder))  # asked for by name
    for here, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(here) / name for name in sorted(names))


def picture_names(files: Sequence[Path], folder: Path, written: bool = True) -> list[Path]:
    """Return a path in `folder` for the overlay of each file; its stem is unique.

    Raises InputError, a ValueError, where an overlay that is `written` would replace one of the files.
    """
    pictures: dict[Path, None] = {}
    numbers: Counter[str] = Counter()
    for path in files:
        picture = folder / f"{path.stem}.png"
        while picture in pictures:
            numbers[path.stem] += 1
            picture = folder / f"{path.stem}_{numbers[path.stem] + 1}.png"
        pictures[picture] = None
    # os.path.realpath, because Path.resolve raises for a link to itself.
    replaced = set(map(os.path.realpath, pictures)) & set(map(os.path.realpath, files))
    if written and replaced:
        raise InputError(f"{min(replaced)}: its overlay would replace it; choose another --output")
    return list(pictures)
