"""Run an exported model on image files, without DeepSpeed.

from giantdet import load_predictor
predictor = load_predictor("runs/demo/export")
found = predictor("image.jpg")
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.ops import batched_nms

from giantdet.architectures import Architecture
from giantdet.config.classes import Classes
from giantdet.config.types import DataConfig
from giantdet.data.images import bomb_text, has_frames, limit_pixels
from giantdet.data.panoptic import PanopticMap
from giantdet.data.pixels import is_batch, rgb_pixels, to_rgb
from giantdet.data.transforms import draw_geometry, transform_image, window_row, windows
from giantdet.engine.tiles import kept_in_tile, shifted_rle, tiles_of
from giantdet.errors import InputError
from giantdet.evaluation.coco import to_original
from giantdet.evaluation.panoptic import panoptic_map
from giantdet.evaluation.rle import Rle, decode_mask
from giantdet.evaluation.semantic import SemanticMaps
from giantdet.export import ExportConfig, load_detector
from giantdet.structures import Batch, Detections, Outputs, Targets

logger = logging.getLogger("giantdet")
ImageLike = str | os.PathLike[str] | IO[bytes] | Image.Image | NDArray[Any] | Tensor
"""A file, or what `pixels.rgb_pixels` takes."""


class Found(NamedTuple):
    """What was found in one image, in pixels of that image. A model without objects finds no detection.

    Masks are kept as COCO's compressed RLE: bitmaps of 100 objects take 18 GB in an image of a satellite.
    """

    boxes_D4: Tensor  # float32 xyxy, best first
    scores_D: Tensor  # float32
    labels_D: Tensor  # int64, class index
    names: list[str]  # by detection
    category_ids: list[int]  # by detection, of the training data set
    rles_D: list[Rle] | None = None  # masks, by detection
    semantic_HW: Tensor | None = None  # int64, number of a class in `ExportConfig.semantic_categories`
    panoptic: PanopticMap | None = None  # its segments' categories are the training data set's ids
    classes: Classes = Classes()  # all that the model knows
    size_hw: tuple[int, int] = (0, 0)  # of the image

    @property
    def masks_DHW(self) -> Tensor | None:
        """The masks as bitmaps, bool, D x h x w bytes, or None without masks; `mask` returns one of them."""
        if self.rles_D is None:
            return None
        if not self.rles_D:
            return torch.zeros(0, *self.size_hw, dtype=torch.bool)
        return torch.stack([self.mask(d) for d in range(len(self.rles_D))])

    def mask(self, d: int) -> Tensor:
        """Return the mask of detection d, bool `[h, w]`."""
        assert self.rles_D is not None
        return decode_mask(self.rles_D[d])

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
            if self.rles_D is not None:
                result["segmentation"] = self.rles_D[d]
            results.append(result)
        return results


class Predictor:
    """A model with the image size and the class names of its export."""

    def __init__(
        self, detector: Architecture, config: ExportConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.detector, self.config, self.device = detector, config, device
        self.data = DataConfig(size=config.size, short_side=config.short_side)

    @overload
    def __call__(
        self, image: ImageLike, threshold: float = 0.5, tile: int | None = None, tile_overlap: float = 0.2
    ) -> Found: ...
    @overload
    def __call__(
        self,
        image: list[Any] | tuple[Any, ...],
        threshold: float = 0.5,
        tile: int | None = None,
        tile_overlap: float = 0.2,
    ) -> list[Found]: ...

    def __call__(
        self,
        image: ImageLike | list[Any] | tuple[Any, ...],
        threshold: float = 0.5,
        tile: int | None = None,
        tile_overlap: float = 0.2,
    ) -> Found | list[Found]:
        """Return what is in an image: detections with a score of at least `threshold`, and maps.

        The image is a file, a PIL image, an array `[h, w]` or `[h, w, c]`, or a tensor `[c, h, w]`, with RGB
        values of 0 to 1, 0 to 255 or 16 bits; `pixels.rgb_pixels` has the rules. A list of them, or an array
        or tensor with four dimensions, gives a list. With `tile`, a larger image is predicted in tiles of
        `tile` x `tile` of its pixels, which overlap by `tile_overlap` of their side; this is for models that
        predict only objects. Raises InputError, a ValueError, in one line for anything else, and for a file
        that is not a readable image.
        """
        if tile is not None:
            self.check_tiles(tile, tile_overlap)
        if not is_batch(image):
            return self._in_tiles(_pixels(image), threshold, tile, tile_overlap)
        if any(map(is_batch, image)):
            raise InputError("a list of images has another list in it; give one list")
        return [self._in_tiles(_pixels(one), threshold, tile, tile_overlap) for one in image]

    def check_tiles(self, tile: int, overlap: float) -> None:
        """Raise InputError, a ValueError, for tiles that are impossible, or not for this model."""
        tiles_of((1, 1), tile, overlap)
        if self.config.model.detections_nms_iou is None or "semantic" in self.detector.tasks:
            raise InputError(
                "tiles (--tile) are for models that predict only objects; this one predicts "
                f"{', '.join(self.detector.tasks)}; for semantic maps, eval.window_stride gives windows"
            )

    def _in_tiles(
        self, pixels: NDArray[np.uint8], threshold: float, side: int | None, overlap: float
    ) -> Found:
        """Return what is in an image, by tiles with a `side`: their detections after NMS by class.

        The model's limit of detections holds for each tile, and none for the image.
        """
        size_hw = (pixels.shape[0], pixels.shape[1])
        tiles = [] if side is None else tiles_of(size_hw, side, overlap)
        if len(tiles) < 2:
            return self._found(pixels, threshold)
        boxes, scores, labels = [], [], []
        rles: list[Rle] = []
        has_masks = False
        for tile in tiles:
            part = self._found(pixels[tile.top : tile.bottom, tile.left : tile.right], threshold)
            boxes_D4 = part.boxes_D4 + torch.tensor([tile.left, tile.top] * 2)
            keep_D = kept_in_tile(boxes_D4, tile)
            boxes.append(boxes_D4[keep_D])
            scores.append(part.scores_D[keep_D])
            labels.append(part.labels_D[keep_D])
            if part.rles_D is not None:
                has_masks = True
                kept = keep_D.nonzero()[:, 0].tolist()
                rles += [shifted_rle(part.rles_D[d], (tile.top, tile.left), size_hw) for d in kept]
        boxes_D4, scores_D, labels_D = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        nms_iou = self.config.model.detections_nms_iou
        assert nms_iou is not None
        best_D = batched_nms(boxes_D4, scores_D, labels_D, nms_iou)
        categories = [self.config.categories[label] for label in labels_D[best_D].tolist()]
        return Found(
            boxes_D4=boxes_D4[best_D],
            scores_D=scores_D[best_D],
            labels_D=labels_D[best_D],
            names=[name for _, name in categories],
            category_ids=[number for number, _ in categories],
            rles_D=[rles[d] for d in best_D.tolist()] if has_masks else None,
            classes=self.config.classes,
            size_hw=size_hw,
        )

    @torch.no_grad()
    def _found(self, pixels: NDArray[np.uint8], threshold: float) -> Found:
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
        return found._replace(
            semantic_HW=semantic_HW, classes=self.config.classes, size_hw=(pixels.shape[0], pixels.shape[1])
        )

    def _objects(self, detections: Detections, batch: Batch, threshold: float) -> Found:
        # A model may have more classes than names: those outputs mean nothing.
        named_BD = detections.labels_BD < len(self.config.categories)
        shown_BD = detections.valid_BD & named_BD & (detections.scores_BD >= threshold)
        detections = detections._replace(valid_BD=shown_BD)
        boxes_D4, rles_D = to_original(detections, batch, 0, self.config.model.reference)
        chosen = detections.valid_BD[0]
        labels_D = detections.labels_BD[0][chosen].cpu()
        categories = [self.config.categories[label] for label in labels_D.tolist()]
        return Found(
            boxes_D4=boxes_D4,
            scores_D=detections.scores_BD[0][chosen].cpu(),
            labels_D=labels_D,
            names=[name for _, name in categories],
            category_ids=[number for number, _ in categories],
            rles_D=rles_D,
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


def _pixels(image: Any) -> NDArray[np.uint8]:
    is_file = isinstance(image, str | os.PathLike) or hasattr(image, "read")
    return load_image(image) if is_file else rgb_pixels(image)


def load_image(path: str | os.PathLike[str] | IO[bytes]) -> NDArray[np.uint8]:
    """Return an image file, by its path or open, as uint8 RGB `[h, w, 3]`, rotated as its EXIF data say.

    Of a file with several frames the first is returned, and a warning says so. Raises InputError, a
    ValueError, that names the file.
    """
    try:
        source = Path(path).expanduser() if isinstance(path, str | os.PathLike) else path
        with Image.open(source) as file:
            pixels_HW3 = np.array(to_rgb(ImageOps.exif_transpose(file)))
            if has_frames(file):
                logger.warning("%s has several frames, of which the first is read", path)
            return pixels_HW3
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {bomb_text(error)}") from error
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


def load_predictor(
    folder: str | Path, device: torch.device | str | None = None, max_image_pixels: int | None = None
) -> Predictor:
    """Return a predictor for the export in a folder; without `device`, on the GPU if there is one.

    `max_image_pixels` lets this process read larger files than Pillow's limit of 178,956,970 pixels. Raises
    InputError, a ValueError, for a folder that is not an export.
    """
    if max_image_pixels is not None:
        limit_pixels(max_image_pixels)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    detector, config = load_detector(Path(folder).expanduser(), device)
    return Predictor(detector, config, device)
