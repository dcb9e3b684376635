"""Run an exported model on image files, without DeepSpeed.

from giantdet import load_predictor
predictor = load_predictor("runs/demo/export")
found = predictor("image.jpg")
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from giantdet.architectures import Architecture
from giantdet.config.classes import Classes
from giantdet.config.types import DataConfig
from giantdet.data.images import IMAGE_ENDINGS, to_rgb
from giantdet.data.panoptic import PanopticMap
from giantdet.data.transforms import draw_geometry, transform_image, window_row, windows
from giantdet.errors import InputError
from giantdet.evaluation.coco import encode_mask, to_original
from giantdet.evaluation.panoptic import panoptic_map
from giantdet.evaluation.semantic import SemanticMaps
from giantdet.export import ExportConfig, load_detector
from giantdet.structures import Batch, Detections, Outputs, Targets


class Found(NamedTuple):
    """What was found in one image, in pixels of that image. A model without objects finds no detection."""

    boxes_D4: Tensor  # float32 xyxy, best first
    scores_D: Tensor  # float32
    labels_D: Tensor  # int64, class index
    names: list[str]  # by detection
    category_ids: list[int]  # by detection, of the training data set
    masks_DHW: Tensor | None = None  # bool
    semantic_HW: Tensor | None = None  # int64, number of a class in `ExportConfig.semantic_categories`
    panoptic: PanopticMap | None = None  # its segments' categories are the training data set's ids
    classes: Classes = Classes()  # all that the model knows

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Return the detections as COCO results."""
        results = []
        for d, (x0, y0, x1, y1) in enumerate(self.boxes_D4.tolist()):
            result: dict[str, Any] = {
                "image_id": image_id,
                "category_id": self.category_ids[d],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(self.scores_D[d]),
            }
            if self.masks_DHW is not None:
                result["segmentation"] = encode_mask(self.masks_DHW[d])
            results.append(result)
        return results


class Predictor:
    """A model with the image size and the class names of its export."""

    def __init__(
        self, detector: Architecture, config: ExportConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.detector, self.config, self.device = detector, config, device
        self.data = DataConfig(size=config.size, short_side=config.short_side)

    @torch.no_grad()
    def __call__(self, image: str | Path | NDArray[np.uint8], threshold: float = 0.5) -> Found:
        """Return what is in an image: detections with a score of at least `threshold`, and maps.

        The image is a file or a uint8 RGB array `[h, w, 3]`. Raises InputError, a ValueError, for a file that
        is not a readable image.
        """
        pixels = image if isinstance(image, np.ndarray) else load_image(image)
        maps = SemanticMaps()
        semantic_HW = None
        for batch in image_batches(pixels, self.data, self.config.window_stride):
            outputs = self.detector(batch.to(self.device))
            if outputs.semantic_BCHW is not None:
                complete = [classes_HW for _, classes_HW in maps.add(outputs.semantic_BCHW, batch)]
                semantic_HW = complete[0] if complete else None
        found = Found(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), [], [])
        if outputs.detections is not None:
            found = self._objects(outputs.detections, batch, threshold)
        if "panoptic" in self.detector.tasks:
            found = found._replace(panoptic=self._panoptic(outputs, batch))
        return found._replace(semantic_HW=semantic_HW, classes=self.config.classes)

    def _objects(self, detections: Detections, batch: Batch, threshold: float) -> Found:
        # A model may have more classes than names: those outputs mean nothing.
        named_BD = detections.labels_BD < len(self.config.categories)
        shown_BD = detections.valid_BD & named_BD & (detections.scores_BD >= threshold)
        detections = detections._replace(valid_BD=shown_BD)
        boxes_D4, masks_DHW = to_original(detections, batch, 0, self.config.model.reference)
        chosen = detections.valid_BD[0]
        labels_D = detections.labels_BD[0][chosen].cpu()
        categories = [self.config.categories[label] for label in labels_D.tolist()]
        return Found(
            boxes_D4=boxes_D4,
            scores_D=detections.scores_BD[0][chosen].cpu(),
            labels_D=labels_D,
            names=[name for _, name in categories],
            category_ids=[number for number, _ in categories],
            masks_DHW=masks_DHW,
        )

    def _panoptic(self, outputs: Outputs, batch: Batch) -> PanopticMap:
        model, classes = self.config.model, self.config.classes
        categories = [*classes.objects, *classes.stuff]
        found = panoptic_map(
            outputs, batch, 0, len(classes.objects), len(categories), model.reference, model.merge_rule
        )
        return found._replace(
            segments=[s._replace(category=categories[s.category][0]) for s in found.segments]
        )


def load_image(path: str | Path) -> NDArray[np.uint8]:
    """Return an image file as uint8 RGB `[h, w, 3]`, rotated as its EXIF data say.

    Raises InputError, a ValueError, that names the file.
    """
    try:
        with Image.open(path) as file:
            return np.array(to_rgb(ImageOps.exif_transpose(file)))
    except Exception as error:  # PIL's plugins raise exceptions of many types for broken files
        raise InputError(f"{path}: not a readable image ({error})") from error


def image_batch(pixels_HW3: NDArray[np.uint8], config: DataConfig) -> Batch:
    """Return a batch of one image, scaled to the canvas as in evaluation, without targets."""
    (batch,) = image_batches(pixels_HW3, config, None)
    return batch


def image_batches(
    pixels_HW3: NDArray[np.uint8], config: DataConfig, window_stride: int | None
) -> Iterator[Batch]:
    """Yield batches of one view of an image as in evaluation, without targets: the image, or its windows."""
    size_hw = (pixels_HW3.shape[0], pixels_HW3.shape[1])
    if window_stride is None:
        views = [draw_geometry(np.random.default_rng(0), size_hw, config, training=False)]
    else:
        views = windows(size_hw, config, window_stride)
    for number, view in enumerate(views):
        canvas = transform_image(pixels_HW3, view, config.size)
        row = None if window_stride is None else torch.tensor([window_row(views, number)])
        yield Batch(
            images_B3HW=torch.from_numpy(canvas).permute(2, 0, 1)[None],
            sizes_B2=torch.tensor([view.size_hw], dtype=torch.float32),
            targets=no_targets(1),
            seeds_B=torch.zeros(1, dtype=torch.int64),
            image_ids_B=torch.zeros(1, dtype=torch.int64),
            original_sizes_B2=torch.tensor([size_hw]),
            windows_B6=row,
        )


def no_targets(batch: int) -> Targets:
    """Return the targets of a batch with zero slots per image."""
    return Targets(
        boxes_BM4=torch.zeros(batch, 0, 4),
        labels_BM=torch.zeros(batch, 0, dtype=torch.int64),
        valid_BM=torch.zeros(batch, 0, dtype=torch.bool),
        masks_BMSS=torch.zeros(batch, 0, 0, 0, dtype=torch.uint8),
        frames_BM4=torch.zeros(batch, 0, 4),
    )


def load_predictor(folder: str | Path, device: torch.device | str | None = None) -> Predictor:
    """Return a predictor for the export in a folder; without `device`, on the GPU if there is one.

    Raises InputError, a ValueError, for a folder that is not an export.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    detector, config = load_detector(folder, device)
    return Predictor(detector, config, device)


def picture_names(files: list[Path], folder: Path) -> list[Path]:
    """Return a path in `folder` for the overlay of each file.

    Raises InputError, a ValueError, where an overlay would replace one of the files.
    """
    pictures: list[Path] = []
    for path in files:
        picture, number = folder / f"{path.stem}.png", 2
        while picture in pictures:
            picture, number = folder / f"{path.stem}_{number}.png", number + 1
        pictures.append(picture)
    # os.path.realpath, because Path.resolve raises for a link to itself.
    if replaced := set(map(os.path.realpath, pictures)) & set(map(os.path.realpath, files)):
        raise InputError(f"{min(replaced)}: its overlay would replace it; choose another --output")
    return pictures


def image_files(paths: list[Path]) -> list[Path]:
    """Return all image files among paths of files and folders.

    Raises InputError, a ValueError, for a path that does not exist, and where there is no image.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
        elif path.exists():
            files.append(path)
        else:
            raise InputError(f"{path}: no such image or folder")
    if not files:
        raise InputError(
            f"{paths[0]}: no image in this folder (looked for {', '.join(sorted(IMAGE_ENDINGS))})"
        )
    return files
