"""Panoptic maps from objects and semantic maps, and panoptic quality (PQ), all on the host.

Shapes: D detections · K classes, those of objects first, then stuff · H, W the original image.
Sources: "Panoptic Segmentation" (Kirillov et al. 2019); `combine_semantic_and_instance_outputs` of detectron2
0.6; `evaluation.py` of cocodataset/panopticapi.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from giantdet.config.architectures.common import ArchitectureConfig
from giantdet.config.architectures.panoptic_merge import PanopticMergeConfig
from giantdet.config.classes import Classes, unique_names
from giantdet.config.conventions import Conventions
from giantdet.config.json_text import json_text
from giantdet.config.types import Backend
from giantdet.data.dataset import Dataset
from giantdet.data.panoptic import VOID, PanopticMap, Segment, panoptic_png
from giantdet.distributed import comm
from giantdet.errors import DataError
from giantdet.evaluation.coco import to_original
from giantdet.evaluation.evaluator import Scores, shown
from giantdet.evaluation.rle import decode_mask
from giantdet.evaluation.semantic import whole_image_classes
from giantdet.evaluation.truth import Truth
from giantdet.structures import Batch, Detections, Outputs

THINGS = 0
"""Class of the semantic map that stands for all objects."""
PANOPTIC_NUMBERS = ("PQ", "SQ", "RQ")
_KINDS = {"": "all", "_th": "things", "_st": "stuff"}


DETECTRON2 = PanopticMergeConfig()


class _Masks:
    """The masks of an image by detection, encoded: bitmaps of all of them may not fit into memory."""

    def __init__(self, detections: Detections, batch: Batch, b: int, conventions: Conventions) -> None:
        rles = to_original(detections, batch, b, conventions)[1]
        assert rles is not None
        self.rles = rles

    def __getitem__(self, row: int) -> NDArray[np.bool_]:
        return decode_mask(self.rles[row]).numpy()


class Merged(NamedTuple):
    """A map with ids from 1 on, objects first; `rows` are the objects' detections, -1 for stuff."""

    panoptic: PanopticMap
    rows: list[int]


def merge(
    masks_DHW: NDArray[np.bool_] | _Masks,
    scores_D: NDArray[np.float32],
    labels_D: NDArray[np.int64],
    semantic_HW: NDArray[np.int64],
    num_classes: int,
    rule: PanopticMergeConfig = DETECTRON2,
) -> Merged:
    """Merge objects by falling score, each on the pixels that are free, and then stuff on what is left.

    The `category` of an object is its label, in [0, num_classes), that of stuff num_classes - 1 + its class.
    """
    ids_HW = np.zeros(semantic_HW.shape, np.int32)
    segments: list[Segment] = []
    rows: list[int] = []
    for row in np.argsort(-scores_D, kind="stable").tolist():
        if scores_D[row] < rule.score:
            break
        mask_HW = masks_DHW[row]
        free_HW = mask_HW & (ids_HW == VOID)
        pixels, free = int(mask_HW.sum()), int(free_HW.sum())
        if free == 0 or (pixels - free) / pixels > rule.overlap:
            continue
        segments.append(Segment(len(segments) + 1, int(labels_D[row])))
        rows.append(row)
        ids_HW[free_HW] = segments[-1].id
    for stuff in np.unique(semantic_HW).tolist():
        free_HW = (semantic_HW == stuff) & (ids_HW == VOID)
        if stuff == THINGS or not free_HW.any() or free_HW.sum() < rule.stuff_area:
            continue
        segments.append(Segment(len(segments) + 1, num_classes - 1 + stuff))
        rows.append(-1)
        ids_HW[free_HW] = segments[-1].id
    return Merged(PanopticMap(ids_HW, segments), rows)


def match_segments(truth: PanopticMap, found: PanopticMap, classes: int) -> NDArray[np.float64]:
    """Return the IoU sum, true positives, false positives and false negatives of an image by class, [K, 4].

    Two segments of a class match where their IoU exceeds 0.5, void pixels of the truth left out of the union.
    Crowds are not missed; a segment that matches nothing is not a false positive if more than half of it lies
    in void or in the crowd of its class. Raises ValueError for an id of a map that no segment has.
    """
    overlap_TF = _overlaps(truth, found)  # row and column 0 are void
    true_T, found_F = overlap_TF.sum(1), overlap_TF.sum(0)
    counts_K4 = np.zeros((classes, 4))
    matched: set[int] = set()
    crowds: dict[int, int] = {}
    for t, segment in enumerate(truth.segments, 1):
        if segment.is_crowd:
            crowds[segment.category] = t  # of two crowds the last counts, as in the official code
            continue
        for f in (np.flatnonzero(overlap_TF[t, 1:]) + 1).tolist():
            if found.segments[f - 1].category != segment.category:
                continue
            both = overlap_TF[t, f]
            iou = both / (true_T[t] + found_F[f] - both - overlap_TF[0, f])
            if iou > 0.5:
                counts_K4[segment.category] += (iou, 1, 0, 0)
                matched.add(f)
                break
        else:
            counts_K4[segment.category, 3] += 1
    for f in range(1, len(found.segments) + 1):
        segment = found.segments[f - 1]
        ignored = overlap_TF[0, f]
        if segment.category in crowds:
            ignored += overlap_TF[crowds[segment.category], f]
        if f not in matched and ignored <= 0.5 * found_F[f] and found_F[f]:
            counts_K4[segment.category, 2] += 1
    return counts_K4


def _overlaps(truth: PanopticMap, found: PanopticMap) -> NDArray[np.int64]:
    """Return the common pixels of segments by their numbers from 1 on, [T + 1, F + 1]; 0 is void."""
    numbers = []
    for ids_HW, segments in (truth, found):
        ids, at = np.unique(ids_HW, return_inverse=True)
        number = {VOID: 0} | {segment.id: n for n, segment in enumerate(segments, 1)}
        if unknown := set(ids.tolist()) - set(number):
            raise ValueError(f"no segment has the id {min(unknown)}, which the map has")
        numbers.append(np.array([number[i] for i in ids.tolist()])[at.reshape(-1)])
    columns = len(found.segments) + 1
    pairs = np.bincount(numbers[0] * columns + numbers[1], minlength=(len(truth.segments) + 1) * columns)
    return pairs.reshape(-1, columns)


def panoptic_scores(counts_K4: NDArray[np.float64], names: Sequence[str], things: int) -> dict[str, Any]:
    """Return PQ, SQ and RQ in [0, 1] of all classes, of objects (`PQ_th`, ...) and of stuff (`PQ_st`, ...).

    Means over the classes that are in the truth or were found; `per_class` has their PQ, None for the others.
    The first `things` classes are those of objects.
    """
    iou_K, true_K, false_K, missed_K = counts_K4.T
    with np.errstate(divide="ignore", invalid="ignore"):
        total_K = true_K + 0.5 * false_K + 0.5 * missed_K
        values_3K = np.stack([iou_K / total_K, iou_K / np.maximum(true_K, 1), true_K / total_K])
    occurs_K = total_K > 0
    is_thing_K = np.arange(len(total_K)) < things
    scores: dict[str, Any] = {}
    for ending, chosen_K in (("", occurs_K), ("_th", occurs_K & is_thing_K), ("_st", occurs_K & ~is_thing_K)):
        for name, values_K in zip(PANOPTIC_NUMBERS, values_3K, strict=True):
            scores[name + ending] = float(values_K[chosen_K].mean()) if chosen_K.any() else None
    scores["per_class"] = {
        name: value if occurs else None
        for name, value, occurs in zip(names, values_3K[0].tolist(), occurs_K.tolist(), strict=True)
    }
    return scores


def panoptic_table(scores: Mapping[str, Any]) -> str:
    """Return PQ, SQ and RQ of all classes, things and stuff, and PQ by class, as text."""
    lines = ["          " + "".join(f"{name:>7}" for name in PANOPTIC_NUMBERS)]
    for ending, kind in _KINDS.items():
        lines.append(f"{kind:<10}" + "".join(shown(scores[name + ending]) for name in PANOPTIC_NUMBERS))
    width = max(map(len, scores["per_class"]), default=0)
    return "\n".join(
        [
            *lines,
            "PQ by class",
            *(f"  {name:<{width}}{shown(pq)}" for name, pq in scores["per_class"].items()),
        ]
    )


class PanopticResult(NamedTuple):
    """One image's segments in COCO's format."""

    image_id: int
    png: bytes
    segments_info: list[dict[str, int]]


def panoptic_result(image_id: int, found: PanopticMap) -> PanopticResult:
    """Return a map, whose categories are the data set's ids, in COCO's format."""
    infos = [{"id": s.id, "category_id": s.category} for s in found.segments]
    return PanopticResult(image_id, panoptic_png(found.ids_HW), infos)


def save_panoptic(
    folder: Path, results: Sequence[PanopticResult], images: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write COCO's panoptic results: the JSON FOLDER.json, with the records of `images`, and PNG files."""
    folder.mkdir(exist_ok=True)
    annotations = []
    for image_id, png, segments in results:
        name = f"{image_id:012d}.png"
        (folder / name).write_bytes(png)
        annotations.append({"image_id": image_id, "file_name": name, "segments_info": segments})
    content: dict[str, Any] = {"images": list(images)} if images else {}
    folder.with_suffix(".json").write_text(json_text(content | {"annotations": annotations}))


class PanopticEvaluator:
    """PQ; see `Evaluator`. Images without panoptic annotations are not scored."""

    PRIMARY: ClassVar[Mapping[str, str]] = {"panoptic": "PQ"}
    WINDOWS: ClassVar[bool] = False
    PROTOCOL: ClassVar[str | None] = None

    def __init__(
        self,
        dataset: Dataset,
        tasks: Sequence[str],
        classes: Classes,
        model: ArchitectureConfig,
        max_detections: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        self.dataset, self.model, self.things = dataset, model, len(classes.objects)
        self.categories = [number for number, _ in (*classes.objects, *classes.stuff)]
        self.names = unique_names([*classes.objects, *classes.stuff])
        self.number = {category: k for k, category in enumerate(self.categories)}
        self.truth = Truth(dataset, "panoptic")
        self.counts_K4 = torch.zeros(len(self.categories), 4, dtype=torch.float64)
        self.results: list[PanopticResult] = []

    def add(self, outputs: Outputs, batch: Batch) -> None:
        """See `Evaluator.add`."""
        for b, image_id in enumerate(batch.image_ids_B.tolist()):
            truth = self.truth.of(image_id)
            if truth is None and (self.dataset.annotated or image_id < 0):
                continue
            found = panoptic_map(
                outputs,
                batch,
                b,
                self.things,
                len(self.categories),
                self.model.reference,
                self.model.merge_rule,
            )
            if truth is not None:
                self._count(image_id, truth, found)
            segments = [s._replace(category=self.categories[s.category]) for s in found.segments]
            self.results.append(panoptic_result(image_id, found._replace(segments=segments)))

    def _count(self, image_id: int, truth: PanopticMap, found: PanopticMap) -> None:
        name = f"the panoptic map of {self.truth.path(image_id)}"
        if truth.ids_HW.shape != found.ids_HW.shape:
            raise DataError(f"{name} has {truth.ids_HW.shape} pixels, its image {found.ids_HW.shape}")
        if unknown := {segment.category for segment in truth.segments} - set(self.number):
            raise DataError(f"{name}: category {min(unknown)} is none of the model's")
        segments = [segment._replace(category=self.number[segment.category]) for segment in truth.segments]
        try:
            counts_K4 = match_segments(truth._replace(segments=segments), found, len(self.categories))
        except ValueError as error:
            raise DataError(f"{name}: {error}") from None
        self.counts_K4 += torch.from_numpy(counts_K4)

    def merge(self) -> None:
        """See `Evaluator.merge`. The segments of images that could not be read are missed."""
        for image_id, truth in self.truth.missed():
            self._count(image_id, truth, PanopticMap(np.zeros_like(truth.ids_HW), []))
        comm.sum_on_cpus_(self.counts_K4)
        self.results = [result for part in comm.gather_objects(self.results) for result in part]

    def scores(self) -> Scores:
        """Return PQ, SQ and RQ, see `panoptic_scores`; {} where no image has panoptic annotations."""
        if not self.counts_K4.any():
            return {}
        return {"panoptic": panoptic_scores(self.counts_K4.numpy(), self.names, self.things)}

    def save(self, file: Path) -> None:
        """Write COCO's panoptic results beside `file`: NAME_panoptic.json, and a folder of PNG files."""
        save_panoptic(file.with_name(f"{file.stem}_panoptic"), self.results)

    def table(self, scores: Scores) -> str:
        """See `panoptic_table`."""
        return panoptic_table(scores["panoptic"]) if "panoptic" in scores else ""


def panoptic_map(
    outputs: Outputs,
    batch: Batch,
    b: int,
    things: int,
    classes: int,
    conventions: Conventions,
    rule: PanopticMergeConfig = DETECTRON2,
) -> PanopticMap:
    """Return the segments of image b at its original size, without classes that the data set lacks."""
    detections = outputs.detections
    assert detections is not None and outputs.semantic_BCHW is not None
    # Masks are large: those that cannot enter are not made.
    wanted_BD = detections.valid_BD & (detections.labels_BD < things) & (detections.scores_BD >= rule.score)
    detections = detections._replace(valid_BD=wanted_BD)
    masks = _Masks(detections, batch, b, conventions)
    semantic_HW = whole_image_classes(outputs.semantic_BCHW, batch, b)
    semantic_HW = torch.where(semantic_HW <= classes - things, semantic_HW, THINGS)
    return merge(
        masks,
        detections.scores_BD[b][wanted_BD[b]].cpu().numpy(),
        detections.labels_BD[b][wanted_BD[b]].cpu().numpy(),
        semantic_HW.numpy(),
        things,
        rule,
    ).panoptic
