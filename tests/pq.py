"""Panoptic quality of files in COCO's panoptic format, computed with sets of pixels. Contains no tests.

"Panoptic Segmentation" (Kirillov et al. 2019), and the rules of cocodataset/panopticapi for void and crowds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = set[int]


def read_ids(png: Path) -> NDArray[np.int64]:
    """Return the id of each pixel: R + 256 G + 256^2 B."""
    rgb = np.array(Image.open(png).convert("RGB")).astype(np.int64)
    return rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]


def read_panoptic(file: Path) -> dict[int, tuple[dict[int, dict[str, Any]], dict[int, Pixels]]]:
    """Return, by image id, its segments and their pixels by segment id; id 0 has the void pixels."""
    found = {}
    for record in json.loads(file.read_text())["annotations"]:
        ids = read_ids(file.with_suffix("") / record["file_name"]).ravel()
        segments = {segment["id"]: segment for segment in record["segments_info"]}
        assert set(ids.tolist()) - {0} == set(segments), file
        pixels = {n: set(np.flatnonzero(ids == n).tolist()) for n in [0, *segments]}
        found[record["image_id"]] = segments, pixels
    return found


def quality(
    truth_file: Path, found_file: Path, without: int | None = None, skip: int | None = None
) -> dict[str, float]:
    """Return the PQ of all classes, of things and of stuff.

    Nothing was predicted in the image `without`; the image `skip` is not scored.
    """
    counts: dict[int, list[float]] = defaultdict(lambda: [0.0, 0, 0, 0])  # IoU, true, false, missed
    answers = read_panoptic(found_file)
    for image_id, (segments, pixels) in read_panoptic(truth_file).items():
        if image_id == skip:
            continue
        answer = answers[image_id] if image_id != without else ({}, {})
        for key, values in _compare((segments, pixels), answer).items():
            counts[key] = [a + b for a, b in zip(counts[key], values, strict=True)]
    things = {c["id"]: c["isthing"] for c in json.loads(truth_file.read_text())["categories"]}
    values = {c: v[0] / (v[1] + v[2] / 2 + v[3] / 2) for c, v in counts.items() if any(v)}
    kinds = {
        "PQ": values,
        "PQ_th": [c for c in values if things[c]],
        "PQ_st": [c for c in values if not things[c]],
    }
    return {name: sum(values[c] for c in chosen) / len(chosen) for name, chosen in kinds.items()}


def _compare(truth: Any, found: Any) -> dict[int, list[float]]:
    counts: dict[int, list[float]] = defaultdict(lambda: [0.0, 0, 0, 0])
    (segments, pixels), (answers, theirs) = truth, found
    matched = set()
    for n, segment in segments.items():
        if segment.get("iscrowd"):
            continue
        category = segment["category_id"]
        for m, answer in answers.items():
            union = (pixels[n] | theirs[m]) - (pixels[0] & theirs[m])
            iou = len(pixels[n] & theirs[m]) / len(union)
            if answer["category_id"] == category and iou > 0.5:
                matched.add(m)
                counts[category][0] += iou
                counts[category][1] += 1
                break
        else:
            counts[category][3] += 1
    for m in answers.keys() - matched:
        category = answers[m]["category_id"]
        crowds = [p for n, p in pixels.items() if n and _is_crowd(segments[n], category)]
        ignored = theirs[m] & pixels[0].union(*crowds)
        counts[category][2] += len(ignored) <= 0.5 * len(theirs[m])
    return counts


def _is_crowd(segment: dict[str, Any], category: int) -> bool:
    return bool(segment.get("iscrowd")) and segment["category_id"] == category
