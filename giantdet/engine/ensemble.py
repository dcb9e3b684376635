"""Ensembles: the detections of several models, or of other programs, fused by class name.

Members run one after the other over all images, so that only one model is in memory at a time; their
detections are kept as COCO results, with masks as RLE. Boxes are fused by `fusion.py`. The mask of a fused
box is the mean of its members' masks inside the box, and a pixel counts from one half on.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from giantdet.config.classes import Category
from giantdet.engine.fusion import Fused, Fusion, fuse
from giantdet.errors import InputError
from giantdet.evaluation.rle import Rle, decode_mask, encode_window

DEFAULT_IOU: dict[str, float] = {"nms": 0.5, "soft_nms": 0.5, "wbf": 0.55}
Result = dict[str, Any]
"""A detection in COCO's results format; its category id is that of the reference classes."""

Sizes = Mapping[int, tuple[int, int]]
"""(height, width) of every image by its id."""


class Member(NamedTuple):
    """The detections of one model or program in all images."""

    name: str
    knows: frozenset[int]  # category ids
    results: list[Result]


def matched(
    reference: Sequence[Category], own: Sequence[Category], name: str
) -> tuple[tuple[Category, ...], str]:
    """Return a member's classes with the ids of `reference`, by name, and a line that says what is matched.

    A class that the reference does not have gets a negative id.
    """
    ids = {known: number for number, known in reversed(reference)}
    classes = tuple((ids.get(known, -1 - n), known) for n, (_, known) in enumerate(own))
    moved = [
        f"{known} {before} -> {after}"
        for (before, known), (after, _) in zip(own, classes, strict=True)
        if after >= 0 and after != before
    ]
    names = {known for _, known in own}
    lacks = [known for _, known in reference if known not in names]
    left_out = [known for number, known in classes if number < 0]
    parts = [f"{len(own) - len(left_out)} classes by name"]
    parts += [f"ids {', '.join(moved)}"] if moved else []
    parts += [f"lacks {', '.join(lacks)}"] if lacks else []
    parts += [f"left out {', '.join(left_out)}"] if left_out else []
    return classes, f"{name}: {'; '.join(parts)}"


def is_member(path: Path) -> bool:
    """Return whether a path is an export or a results file, and not an image."""
    return path.suffix.lower() == ".json" or (path / "config.json").is_file()


def read_member(file: Path, reference: Sequence[Category], sizes: Sizes) -> Member:
    """Return the detections of a COCO results JSON, whose ids are those of the images and of `reference`.

    Raises InputError, a ValueError, that names the file and the record.
    """
    try:
        results = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{file}: not a JSON file ({error})") from None
    if not isinstance(results, list):
        raise InputError(f"{file}: not COCO results, which are a list of detections")
    known = {number for number, _ in reference}
    for n, result in enumerate(results):
        problem = _problem(result, known, sizes)
        if problem:
            raise InputError(f"{file}: record {n}: {problem}")
    return Member(str(file), frozenset(known), results)


def _problem(result: Any, categories: set[int], sizes: Sizes) -> str | None:
    if not isinstance(result, dict):
        return "not a detection"
    box, score = result.get("bbox"), result.get("score")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "bbox is not [x, y, width, height]"
    if not _is_number(score):
        return "no score"
    if result.get("category_id") not in categories:
        return f"category_id {result.get('category_id')} is not among the data set's categories"
    if result.get("image_id") not in sizes:
        return f"image_id {result.get('image_id')} is not among the images"
    rle = result.get("segmentation")
    if rle is not None and not (isinstance(rle, dict) and isinstance(rle.get("counts"), str)):
        return "segmentation is not a compressed RLE"
    if rle is not None and rle.get("size") != [*sizes[result["image_id"]]]:
        return (
            f"the size of the segmentation is {rle.get('size')}, of the image {[*sizes[result['image_id']]]}"
        )
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fuse_members(
    members: Sequence[Member], kind: Fusion, sizes: Sizes, iou: float | None = None
) -> list[Result]:
    """Return the fused detections, image by image, best first, with masks if any member has some.

    `iou` None: 0.55 for weighted boxes, else 0.5. A class is fused over the members that know it. An image
    has at most as many detections as the member with the most detections in it.
    """
    iou = DEFAULT_IOU[kind] if iou is None else iou
    has_masks = any(result.get("segmentation") for member in members for result in member.results)
    by_image: dict[int, list[list[Result]]] = defaultdict(lambda: [[] for _ in members])
    for m, member in enumerate(members):
        for result in member.results:
            by_image[result["image_id"]][m].append(result)
    fused: list[Result] = []
    for image_id in sorted(by_image):
        found = by_image[image_id]
        of_image = [
            result
            for classes, count in _groups(members)
            for result in _fuse_image(
                found, classes, count, kind, iou, sizes[image_id] if has_masks else None
            )
        ]
        of_image.sort(key=lambda result: -result["score"])
        fused += [{"image_id": image_id, **result} for result in of_image[: max(map(len, found))]]
    return fused


def _groups(members: Sequence[Member]) -> list[tuple[set[int], int]]:
    """Return the category ids by the number of members that know them."""
    groups: dict[int, set[int]] = defaultdict(set)
    for category in frozenset[int]().union(*(member.knows for member in members)):
        groups[sum(category in member.knows for member in members)].add(category)
    return [(classes, count) for count, classes in sorted(groups.items())]


def _fuse_image(
    found: list[list[Result]],
    classes: set[int],
    count: int,
    kind: Fusion,
    iou: float,
    mask_hw: tuple[int, int] | None,
) -> list[Result]:
    """Return the fused detections of some classes, which `count` members know, without the image's id."""
    results = [(m, r) for m, part in enumerate(found) for r in part if r["category_id"] in classes]
    boxes_N4 = torch.tensor([r["bbox"] for _, r in results], dtype=torch.float64).view(-1, 4)
    boxes_N4[:, 2:] += boxes_N4[:, :2]
    scores_N = torch.tensor([r["score"] for _, r in results], dtype=torch.float64)
    labels_N = torch.tensor([r["category_id"] for _, r in results], dtype=torch.int64)
    fused: Fused = fuse(kind, boxes_N4, scores_N, labels_N, iou, count)
    merged = []
    for box, score, label, cluster in zip(
        fused.boxes_D4.tolist(), fused.scores_D.tolist(), fused.labels_D.tolist(), fused.clusters, strict=True
    ):
        x0, y0, x1, y1 = box
        result: Result = {
            "category_id": label,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        if mask_hw is not None:
            # One mask of each member: that of its best box.
            best = {results[n][0]: results[n][1].get("segmentation") for n in reversed(cluster)}
            result["segmentation"] = mean_mask([rle for rle in best.values() if rle], box, mask_hw)
        merged.append(result)
    return merged


def mean_mask(rles: Sequence[Rle], box: Sequence[float], size_hw: Sequence[int]) -> Rle:
    """Return the mask of the pixels in a box, xyxy, that at least half of the masks have.

    Without any mask, because only members without masks have found the object, these are all pixels.
    """
    height, width = size_hw
    left, top = max(math.floor(box[0]), 0), max(math.floor(box[1]), 0)
    right, bottom = min(math.ceil(box[2]), width), min(math.ceil(box[3]), height)
    shape = (max(bottom - top, 0), max(right - left, 0))
    votes_hw: NDArray[np.int64] = np.zeros(shape, np.int64)
    for rle in rles:
        votes_hw += decode_mask(rle)[top:bottom, left:right].numpy()
    mask_hw = 2 * votes_hw >= len(rles)
    return encode_window(mask_hw, (top, left), (height, width))
