"""Detections of many images as arrays, and as the list of records that is COCO's results format.

Arrays are what ranks send to each other and what is scored: 5,000 images have half a million detections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_util

from giantdet.evaluation.rle import Rles


class CocoResults(NamedTuple):
    """N detections in pixels of their original images, with the ids of the data set."""

    image_ids_N: NDArray[np.int64]
    category_ids_N: NDArray[np.int64]
    boxes_N4: NDArray[np.float64]  # left, top, width, height
    scores_N: NDArray[np.float64]
    rles: Rles | None = None

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> CocoResults:
        """Return the arrays of COCO results; they have masks if each of them has a compressed RLE.

        The box of a record without `bbox` is that of its mask, as in pycocotools.
        """
        boxes = [r["bbox"] if "bbox" in r else mask_util.toBbox(r["segmentation"]) for r in records]
        has_masks = all("segmentation" in record for record in records)
        return cls(
            np.array([record["image_id"] for record in records], np.int64),
            np.array([record["category_id"] for record in records], np.int64),
            np.array(boxes, np.float64).reshape(-1, 4),
            np.array([record["score"] for record in records], np.float64),
            Rles.of([record["segmentation"] for record in records]) if has_masks else None,
        )

    @classmethod
    def joined(cls, parts: Sequence[CocoResults]) -> CocoResults:
        """Return the detections of all parts, one after the other, with masks if each part has some."""
        if not parts:
            return cls.of([])
        rles = [part.rles for part in parts if part.rles is not None]
        return cls(
            np.concatenate([part.image_ids_N for part in parts]),
            np.concatenate([part.category_ids_N for part in parts]),
            np.concatenate([part.boxes_N4 for part in parts]),
            np.concatenate([part.scores_N for part in parts]),
            Rles.joined(rles) if len(rles) == len(parts) else None,
        )

    def at(self, rows_K: NDArray[np.int64]) -> CocoResults:
        """Return the detections of these rows."""
        return CocoResults(
            self.image_ids_N[rows_K],
            self.category_ids_N[rows_K],
            self.boxes_N4[rows_K],
            self.scores_N[rows_K],
            None if self.rles is None else self.rles.at(rows_K),
        )

    def records(self, boxes: bool = True, masks: bool = True) -> list[dict[str, Any]]:
        """Return COCO results, with or without `bbox` and, where there are masks, `segmentation`."""
        columns: dict[str, list[Any]] = {
            "image_id": self.image_ids_N.tolist(),
            "category_id": self.category_ids_N.tolist(),
        }
        if boxes:
            columns["bbox"] = self.boxes_N4.tolist()
        columns["score"] = self.scores_N.tolist()
        if masks and self.rles is not None:
            columns["segmentation"] = self.rles.records()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
