"""Sections with pictures: validation images with truth and predictions, and training images as the model
sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from giantdet.data.panoptic import PanopticMap, Segment, read_panoptic_png
from giantdet.data.streams import TrainStream
from giantdet.engine.found import Found, truth_of
from giantdet.errors import DataError
from giantdet.evaluation.examples import EACH, random_order
from giantdet.evaluation.panoptic import match_segments
from giantdet.report.matching import IOU, ImageBoxes, Judged, image_boxes
from giantdet.report.page import Html, grid, joined, paragraph, photos
from giantdet.report.page import number as score_text
from giantdet.report.photos import Photo, drawn, map_found, objects_found, sample_found
from giantdet.report.run import RESULTS, Missing, Run

_BATCH = 6
"""Training images that are shown."""
_THRESHOLD = 0.5
_SCORED_MAPS = 200
"""Panoptic maps that are compared to find the best and the worst."""
KINDS = ("best", "worst", "random")
LEFT = "Left (on a phone above) the annotations, right the predictions. "


class Compared(NamedTuple):
    """A validation image with what is drawn on both copies of it."""

    kind: str
    image_id: int
    score: float
    truth: Found
    found: Found


def validation(run: Run) -> Html:
    """Return the truth beside the predictions of the best, the worst and random validation images."""
    tasks = run.model.tasks
    choice = _panoptic if "panoptic" in tasks else _objects if "box" in tasks else _semantic
    rule, compared = choice(run)
    index = {int(image_id): i for i, image_id in enumerate(run.validation.image_ids)}
    folder = run.pictures / "validation"
    folder.mkdir(exist_ok=True)
    parts = []
    for number, one in enumerate(compared):
        i = index[one.image_id]
        name = run.validation.path(i).name
        try:
            image = run.validation.read_image(i)
        except DataError as error:
            parts.append(paragraph(f"{name}: {error}"))
            continue
        pair = [Photo.of(drawn(image, one.truth, scores=False)), Photo.of(drawn(image, one.found))]
        for photo, what in zip(pair, ("annotated", "predicted"), strict=True):
            (folder / f"{number:02d}_{one.kind}_{what}.jpg").write_bytes(photo.jpeg)
        parts.append(photos(pair, f"{one.kind}, {score_text(one.score, 2)} · {name}"))
    if not parts:
        raise Missing("no validation image has a score")
    return joined([paragraph(rule), grid(parts, "pairs")])


def batches(run: Run) -> Html:
    """Return the first images of the training stream after augmentation, with their targets drawn."""
    config = run.config.giantdet
    dataset = run.training
    stream = TrainStream(dataset, config.data, config.train.seed, run.model.targets - {"ignored"})
    classes, folder = run.classes, run.pictures / "train"
    folder.mkdir(exist_ok=True)
    parts = []
    for k in range(_BATCH):
        sample = stream[k]
        path = next(iter(np.flatnonzero(dataset.image_ids == sample.image_id)), None)
        name = "" if path is None else dataset.path(int(path)).name
        height, width = sample.image_hw3.shape[:2]
        founds = [sample_found(sample, classes)]
        if len(sample.labels_N) and sample.semantic_HW.size:
            founds.append(map_found(sample.semantic_HW[:height, :width], classes))
        pictures = [Photo.of(drawn(sample.image_hw3, found, scores=False)) for found in founds]
        for number, picture in enumerate(pictures):
            (folder / f"{k:02d}_{number}.jpg").write_bytes(picture.jpeg)
        objects = f", {len(sample.labels_N)} objects" if "boxes" in stream.targets else ""
        parts.append(photos(pictures, f"{name} · {width} × {height}{objects}"))
    height, width = config.data.size
    rule = paragraph(
        f"The first {_BATCH} images of the run as the model sees them: scaled, cropped, flipped and changed "
        f"in colour as data.augment says, before they are padded to {width} × {height} pixels. Boxes, masks "
        "and maps are the targets of its losses: they must fit the objects."
    )
    both = {"boxes", "semantic"} <= stream.targets
    return joined([rule, grid(parts, "pairs" if both else "photos")])


def _objects(run: Run) -> tuple[str, Iterator[Compared]]:
    if run.validation.protocol != "coco":
        return _without_scores(run)
    detections = run.detections
    threshold = detections.thresholds.best
    scores = {
        image.image_id: f1(image, judged, threshold)
        for image, judged in zip(detections.images, detections.judged, strict=True)
    }
    images = {image.image_id: image for image in detections.images}
    rule = (
        LEFT + "The number is the image's F1 at the threshold "
        f"{threshold:.2f}, with boxes that overlap by an IoU of {IOU}: twice the right detections, divided "
        "by detections and objects. Best and worst are those of the highest and the lowest F1; of equal "
        "ones, those with more objects."
    )

    def compared() -> Iterator[Compared]:
        for kind, image_id in chosen(scores, lambda i: len(images[i].labels_G)):
            yield _with_objects(run, kind, scores[image_id], images[image_id].above(threshold))

    return rule, compared()


def _without_scores(run: Run) -> tuple[str, Iterator[Compared]]:
    images = {image.image_id: image for image in image_boxes(run.truth, run.results, run.max_detections)}
    rule = (
        LEFT + f"Random images, with the detections of a score of at least {_THRESHOLD}. Images of "
        f"{run.validation.protocol.upper()} are not annotated with all classes, so none is best or worst."
    )
    nowhere = dict.fromkeys(images, float("nan"))
    found = chosen(nowhere, lambda _: 0)
    return rule, (_with_objects(run, kind, nowhere[i], images[i].above(_THRESHOLD)) for kind, i in found)


def f1(image: ImageBoxes, judged: Judged, threshold: float) -> float:
    """Return F1 of an image at a threshold; NaN where there is neither object nor detection."""
    kept_N = (image.scores_N >= threshold) & ~judged.ignored_N
    total = int(kept_N.sum()) + int((~image.ignored_G).sum())
    return 2 * int((judged.right_N & kept_N).sum()) / total if total else float("nan")


def chosen(scores: dict[int, float], size: Callable[[int], int]) -> list[tuple[str, int]]:
    """Return kind and id of the best, the worst and random images; of equal scores those of larger size.

    No image is chosen twice, and those whose score is NaN only as random ones.
    """
    scored = [image_id for image_id, score in scores.items() if score == score]
    best = sorted(scored, key=lambda i: (-scores[i], -size(i), i))[:EACH]
    worst = sorted(set(scored) - set(best), key=lambda i: (scores[i], -size(i), i))[:EACH]
    rest = sorted(set(scores) - set(best) - set(worst), key=random_order)[:EACH]
    return [(kind, i) for kind, found in zip(KINDS, (best, worst, rest), strict=True) for i in found]


def _with_objects(run: Run, kind: str, score: float, image: ImageBoxes) -> Compared:
    classes = run.validation.classes
    i = int(np.flatnonzero(run.validation.image_ids == image.image_id)[0])
    height, width = (int(side) for side in run.validation.sizes_hw[i])
    truth = truth_of(run.validation, i)._replace(semantic_HW=None, panoptic=None)
    if "mask" not in run.model.tasks:
        truth = truth._replace(rles_D=None)
    numbers = {category: k for k, category in enumerate(sorted(run.truth.cats))}
    position = {numbers[category]: k for k, (category, _) in enumerate(classes.objects)}
    rles = run.results.rles
    found = objects_found(
        image.boxes_N4,
        np.array([position[k] for k in image.labels_N.tolist()], np.int64),
        image.scores_N,
        None if rles is None else rles.at(image.rows_N).records(),
        classes,
        (height, width),
    )
    return Compared(kind, image.image_id, score, truth, found)


def _semantic(run: Run) -> tuple[str, Iterator[Compared]]:
    folder = run.folder / RESULTS.replace(".json", "_semantic")
    listed = run.json_of(f"{folder.name}.json") or {}
    if not listed.get("examples"):
        raise Missing(f"there is no {folder.name}.json with examples: the run was not evaluated yet")
    index = {int(image_id): i for i, image_id in enumerate(run.validation.image_ids)}

    def compared() -> Iterator[Compared]:
        seen: set[int] = set()
        for record in listed["examples"]:
            image_id = record["image_id"]
            truth_HW = run.validation.semantic_map(index[image_id])
            if image_id in seen or truth_HW is None:
                continue
            seen.add(image_id)
            with Image.open(folder / f"{image_id}.png") as file:
                found_HW = np.asarray(file)
            maps = (map_found(map_HW, run.classes) for map_HW in (truth_HW, found_HW))
            yield Compared(record["kind"], image_id, record["score"], *maps)

    rule = (
        LEFT + "The number is the mean IoU of the classes that the "
        "annotations of the image have. Best and worst are those of the highest and the lowest."
    )
    return rule, compared()


def _panoptic(run: Run) -> tuple[str, Iterator[Compared]]:
    name = RESULTS.replace(".json", "_panoptic")
    results = {
        record["image_id"]: record for record in (run.json_of(f"{name}.json") or {}).get("annotations", ())
    }
    if not results:
        raise Missing(f"there is no {name}.json: the run was not evaluated yet")
    index = {int(image_id): i for i, image_id in enumerate(run.validation.image_ids)}
    classes = run.validation.classes
    number = {category: k for k, (category, _) in enumerate((*classes.objects, *classes.stuff))}

    def both(image_id: int) -> tuple[PanopticMap | None, PanopticMap]:
        record = results[image_id]
        segments = [Segment(s["id"], s["category_id"]) for s in record["segments_info"]]
        ids_HW = read_panoptic_png(run.folder / name / record["file_name"])
        return run.validation.panoptic_map(index[image_id]), PanopticMap(ids_HW, segments)

    known = sorted(set(results) & set(index), key=random_order)[:_SCORED_MAPS]
    scores = {}
    for image_id in known:
        truth, found = both(image_id)
        if truth is not None:
            scores[image_id] = _quality(truth, found, number)

    def compared() -> Iterator[Compared]:
        for kind, image_id in chosen(scores, lambda _: 0):
            truth, found = both(image_id)
            maps = (_panoptic_found(part, run) for part in (truth, found) if part is not None)
            yield Compared(kind, image_id, scores[image_id], *maps)

    rule = (
        LEFT + "The number is the image's PQ: its mean over the classes that "
        f" are in the annotations or were found. Best and worst are those of {len(scores)} images."
    )
    return rule, compared()


def _quality(truth: PanopticMap, found: PanopticMap, number: dict[int, int]) -> float:
    """Return PQ of one image."""
    maps = [
        part._replace(segments=[s._replace(category=number[s.category]) for s in part.segments])
        for part in (truth, found)
    ]
    iou_K, right_K, false_K, missed_K = match_segments(maps[0], maps[1], len(number)).T
    total_K = right_K + 0.5 * false_K + 0.5 * missed_K
    occurs_K: NDArray[np.bool_] = total_K > 0
    return float((iou_K[occurs_K] / total_K[occurs_K]).mean()) if occurs_K.any() else float("nan")


def _panoptic_found(part: PanopticMap, run: Run) -> Found:
    found = map_found(np.zeros((1, 1), np.uint8), run.validation.classes)
    return found._replace(semantic_HW=None, panoptic=part)
