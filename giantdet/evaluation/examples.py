"""The maps of a few images, which an evaluation keeps for pictures: the best, the worst, and random ones."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from giantdet.distributed import comm

EACH = 3
"""Images of each kind."""


class Example(NamedTuple):
    """One image: its score, and its map of class numbers as the content of a PNG file."""

    image_id: int
    score: float
    png: bytes


class Examples:
    """Keeps the maps of the images of the highest and lowest score, and of the first by a hash of the id.

    The hash depends on the id alone, so that all evaluations of a data set keep the same random images.
    """

    def __init__(self) -> None:
        self.kept: dict[str, list[Example]] = {kind: [] for kind in _ORDERS}

    def add(self, image_id: int, score: float, map_HW: Tensor) -> None:
        """Offer the map, int64 `[H, W]` with classes below 256, of an image; NaN is no score."""
        if score != score:
            return
        example = Example(image_id, score, b"")
        for kind, order in _ORDERS.items():
            kept = self.kept[kind]
            if len(kept) < EACH or order(example) < order(kept[-1]):
                if not example.png:
                    example = example._replace(png=_png(map_HW))
                self.kept[kind] = sorted([*kept, example], key=order)[:EACH]

    def merge(self) -> None:
        """Collect those of all ranks on the main rank. All ranks call it."""
        parts = comm.gather_objects(self.kept)
        for kind, order in _ORDERS.items() if parts else ():
            self.kept[kind] = sorted((e for part in parts for e in part[kind]), key=order)[:EACH]

    def save(self, folder: Path) -> list[dict[str, Any]]:
        """Write ID.png files of class numbers, and return a record of each with its kind and score."""
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.png"):  # of an earlier evaluation
            old.unlink()
        records = []
        for kind, kept in self.kept.items():
            for example in kept:
                (folder / f"{example.image_id}.png").write_bytes(example.png)
                records.append({"kind": kind, "image_id": example.image_id, "score": example.score})
        return records


_ORDERS: dict[str, Callable[[Example], Any]] = {
    "best": lambda example: (-example.score, example.image_id),
    "worst": lambda example: (example.score, example.image_id),
    "random": lambda example: random_order(example.image_id),
}


def random_order(image_id: int) -> tuple[int, int]:
    """Return a key by which images are in an order that has nothing to do with their content."""
    return zlib.crc32(str(image_id).encode()), image_id


def _png(map_HW: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(map_HW.numpy().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
