"""Predict a list of image files, and write overlays and results as the list is worked through."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from giantdet.config.types import TtaConfig
from giantdet.engine.draw import draw
from giantdet.engine.inputs import InputImage
from giantdet.engine.predict import Predictor
from giantdet.engine.results import Results
from giantdet.errors import InputError

logger = logging.getLogger("giantdet")


def predict_files(
    predictor: Predictor,
    images: Sequence[InputImage],
    pictures: Sequence[Path],
    results: Results,
    threshold: float,
    tile: int | None,
    tile_overlap: float,
    batch_size: int,
    overlays: bool,
    tta: TtaConfig | None = None,
) -> None:
    """Predict all readable images, and print a line for each; see `Predictor.__call__`.

    `pictures` are the files of the overlays, one per image. Raises InputError at the end if images could not
    be read; the results of the others are written.
    """
    left_out: list[str] = []
    # A bar is shown only on a terminal; tqdm.write prints above it, to stdout.
    bar = tqdm(total=len(images), unit="image", dynamic_ncols=True, disable=None)
    at_a_time = batch_size if tile is None else 1  # of a large image, the tiles fill the batch
    for first in range(0, len(images), at_a_time):
        read: list[tuple[InputImage, Path, Any]] = []
        part = slice(first, first + at_a_time)
        for image, picture in zip(images[part], pictures[part], strict=True):
            try:
                read.append((image, picture, image.read()))
            except ValueError as error:
                logger.warning("image left out: %s", error)
                left_out.append(str(error))
        found = predictor(
            [pixels for *_, pixels in read],
            threshold,
            tile,
            tile_overlap,
            batch_size=batch_size,
            progress=True,
            tta=tta,
        )
        for (image, picture, pixels), one in zip(read, found, strict=True):
            words = [results.add(image.number, image.path, picture.stem, one)]
            if overlays:
                draw(pixels, one).save(picture)
                words.append(str(picture))
            tqdm.write(f"{image.path}: {', '.join(words)}")
        bar.update(len(images[part]))
    bar.close()
    for file in results.write():
        print(f"results: {file}")
    if left_out:
        raise InputError(f"{len(left_out)} of {len(images)} images are left out, the first: {left_out[0]}")
