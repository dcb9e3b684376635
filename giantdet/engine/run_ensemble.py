"""Run the members of an ensemble one after the other, on a data set or on image files, and fuse them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from giantdet.config.classes import Category, Classes
from giantdet.config.json_text import json_text
from giantdet.config.types import Backend, DataConfig, TtaConfig
from giantdet.data.dataset import Dataset
from giantdet.distributed import comm
from giantdet.engine.draw import draw
from giantdet.engine.ensemble import Member, Result, Sizes, fuse_members, matched, read_member
from giantdet.engine.evaluate import evaluate
from giantdet.engine.found import Found
from giantdet.engine.fusion import Fusion
from giantdet.engine.inputs import InputImage
from giantdet.engine.predict import Predictor, load_predictor
from giantdet.engine.progress import shown_batches
from giantdet.engine.results import Results
from giantdet.errors import InputError
from giantdet.evaluation import detection_metric
from giantdet.evaluation.backends import check_backend
from giantdet.evaluation.coco_results import CocoResults
from giantdet.export import load_detector

logger = logging.getLogger("giantdet")
TASKS = ("box", "mask")


class Choice(NamedTuple):
    """Settings of an ensemble: those of `evaluate` and `Predictor`, for every member."""

    fuse: Fusion
    batch_size: int = 1
    max_image_pixels: int | None = None
    tta: TtaConfig | None = None
    iou: float | None = None


def evaluate_ensemble(
    paths: Sequence[Path],
    dataset: Dataset,
    choice: Choice,
    device: torch.device,
    workers: int,
    max_detections: int | None,
    backend: Backend,
    file: Path | None,
) -> str:
    """Return the scores of the fused detections as a table, on the main rank; `file` gets the detections.

    All ranks call it: each member is evaluated by all of them, and its box or mask AP printed.
    """
    check_backend(backend)
    reference = dataset.classes.objects
    sizes: Sizes = {
        int(number): (int(height), int(width))
        for number, (height, width) in zip(dataset.image_ids, dataset.sizes_hw, strict=True)
    }
    members: list[Member] = []
    with TemporaryDirectory() as folder:
        for path in paths:
            if path.suffix.lower() == ".json":
                members.append(read_member(path, reference, sizes))
                continue
            detector, config = load_detector(path, device)
            check_tasks(path, detector.tasks)
            classes, line = matched(reference, config.classes.objects, str(path))
            found = evaluate(
                detector,
                dataset,
                config.data_config(
                    workers=workers,
                    max_image_pixels=choice.max_image_pixels or DataConfig().max_image_pixels,
                ),
                choice.batch_size,
                device,
                tasks=[task for task in detector.tasks if task in TASKS],
                model_config=config.model,
                classes=Classes(objects=classes),
                max_detections=max_detections,
                backend=backend,
                results=Path(folder) / "member.json",
                tta=choice.tta,
                batches=shown_batches,
            )
            results: list[Result] = []
            if comm.is_main():
                alone = "" if found.primary is None else f"; AP alone {found.primary:.3f}"
                print(line + alone)
                results = json.loads((Path(folder) / "member.json").read_text())
            known = frozenset(number for number, _ in classes if number >= 0)
            members.append(Member(str(path), known, results))
    check_known(reference, members)  # on all ranks, so that an error ends all of them
    if not comm.is_main():
        return ""
    fused = fuse_members(members, choice.fuse, sizes, choice.iou)
    if file is not None:
        file.write_text(json_text(fused))
    if not dataset.annotated:
        return f"{dataset.annotations}: no annotations, so there are no scores; the detections are in {file}"
    masks = dataset.has_masks and any("segmentation" in result for result in fused)
    metric = detection_metric(dataset)
    return metric.table(metric.score(dataset, CocoResults.of(fused), masks, max_detections, backend))


def predict_ensemble(
    paths: Sequence[Path],
    images: Sequence[InputImage],
    pictures: Sequence[Path],
    output: Path,
    choice: Choice,
    device: str | None,
    threshold: float,
    overlays: bool,
) -> None:
    """Predict all readable images with each member, and print a line for each image.

    The classes and their ids are those of the first member, an export. Detections of every score are fused,
    and those below `threshold` left out afterwards. Raises InputError at the end if images could not be read.
    """
    if paths[0].suffix.lower() == ".json":
        raise InputError(f"{paths[0]}: the first member must be an export, which has the classes' names")
    members: list[Member] = []
    reference: tuple[Category, ...] = ()
    sizes: dict[int, tuple[int, int]] = {}
    left_out: dict[int, str] = {}
    tasks: set[str] = set()
    for path in paths:
        if path.suffix.lower() == ".json":
            members.append(read_member(path, reference, sizes))
            continue
        predictor = load_predictor(path, device, choice.max_image_pixels)
        check_tasks(path, predictor.detector.tasks)
        reference = reference or predictor.config.classes.objects
        tasks.update(task for task in predictor.detector.tasks if task in TASKS)
        classes, line = matched(reference, predictor.config.classes.objects, str(path))
        print(line)
        results: list[Result] = []
        for image in tqdm(images, path.name, unit="image", dynamic_ncols=True, disable=None):
            if image.number in left_out:
                continue
            try:
                pixels = image.read()
            except ValueError as error:
                logger.warning("image left out: %s", error)
                left_out[image.number] = str(error)
                continue
            sizes[image.number] = (pixels.shape[0], pixels.shape[1])
            results += _found_by(predictor, pixels, image.number, classes, choice)
        known = frozenset(number for number, _ in classes if number >= 0)
        members.append(Member(str(path), known, results))
    check_known(reference, members)
    by_image: dict[int, list[Result]] = {}
    for result in fuse_members(members, choice.fuse, sizes, choice.iou):
        if result["score"] >= threshold:
            by_image.setdefault(result["image_id"], []).append(result)
    written = Results(output, [task for task in TASKS if task in tasks], Classes(objects=reference))
    for image, picture in zip(images, pictures, strict=True):
        if image.number in left_out:
            continue
        found = _as_found(by_image.get(image.number, []), reference, sizes[image.number])
        words = [written.add(image.number, image.path, picture.stem, found)]
        if overlays:
            draw(image.read(), found).save(picture)
            words.append(str(picture))
        print(f"{image.path}: {', '.join(words)}")
    for file in written.write():
        print(f"results: {file}")
    if left_out:
        first = next(iter(left_out.values()))
        raise InputError(f"{len(left_out)} of {len(images)} images are left out, the first: {first}")


def _found_by(
    predictor: Predictor, pixels: Any, number: int, classes: Sequence[Category], choice: Choice
) -> list[Result]:
    """Return the detections of the classes that the reference has, with its ids."""
    found = predictor(pixels, 0.0, batch_size=choice.batch_size, tta=choice.tta)
    ids = [classes[label][0] for label in found.labels_D.tolist()]
    results = [
        {**result, "category_id": category}
        for result, category in zip(found.to_coco(number), ids, strict=True)
    ]
    return [result for result in results if result["category_id"] >= 0]


def _as_found(results: Sequence[Result], reference: Sequence[Category], size_hw: tuple[int, int]) -> Found:
    ids = [number for number, _ in reference]
    labels = [ids.index(result["category_id"]) for result in results]
    boxes_D4 = torch.tensor([result["bbox"] for result in results], dtype=torch.float32).view(-1, 4)
    boxes_D4[:, 2:] += boxes_D4[:, :2]
    has_masks = any("segmentation" in result for result in results)
    return Found(
        boxes_D4=boxes_D4,
        scores_D=torch.tensor([result["score"] for result in results], dtype=torch.float32),
        labels_D=torch.tensor(labels, dtype=torch.int64),
        names=[reference[label][1] for label in labels],
        category_ids=[result["category_id"] for result in results],
        rles_D=[result["segmentation"] for result in results] if has_masks else None,
        classes=Classes(objects=tuple(reference)),
        size_hw=size_hw,
    )


def check_tasks(path: Path, tasks: Sequence[str]) -> None:
    """Raise InputError for a model that finds no objects: only boxes and masks are fused."""
    if "box" not in tasks:
        raise InputError(f"{path}: predicts {', '.join(tasks)}; --fuse is for models of objects")


def check_known(reference: Sequence[Category], members: Sequence[Member]) -> None:
    """Raise InputError if a class is known to no member."""
    for number, name in reference:
        if not any(number in member.knows for member in members):
            raise InputError(f"class {name!r} is known to none of {', '.join(m.name for m in members)}")
