"""Random detections and objects, with crowds, ignored objects, equal scores and equal IoUs."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from giantdet.data.truth import NEUTRAL
from giantdet.evaluation.coco_results import CocoResults

CATEGORIES = {3: "cat", 7: "dog", 20: "bird"}


def scene(seed: int, images: int = 12, crowds: bool = True) -> tuple[COCO, CocoResults]:
    """Boxes on a coarse lattice, so that they overlap often, and some exactly."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        for _ in range(rng.integers(0, 7)):
            box = lattice_box(rng)
            record = {"image_id": image_id, "category_id": int(rng.choice(list(CATEGORIES))), "bbox": box}
            record |= {"id": len(annotations) + 1, "area": box[2] * box[3], "iscrowd": 0}
            if crowds:
                record["iscrowd"] = int(rng.random() < 0.15)
                if rng.random() < 0.1:
                    record[NEUTRAL] = 1
            annotations.append(record)
        for _ in range(rng.integers(0, 12)):
            near = [a for a in annotations if a["image_id"] == image_id]
            one = near[rng.integers(len(near))] if near and rng.random() < 0.7 else None
            box = lattice_box(rng) if one is None else [v + float(rng.integers(-2, 3)) for v in one["bbox"]]
            same = one is not None and rng.random() < 0.7
            category = one["category_id"] if same else int(rng.choice(list(CATEGORIES)))
            score = round(float(rng.random()), 1)  # many are equal
            records.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
    truth = COCO()
    truth.dataset = {
        "images": [{"id": n, "height": 64, "width": 64} for n in range(1, images + 1)],
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth, CocoResults.of(records)


def lattice_box(rng: np.random.Generator) -> list[float]:
    x, y = rng.integers(0, 6, 2) * 8
    width, height = rng.integers(1, 4, 2) * 8
    return [float(x), float(y), float(width), float(height)]
