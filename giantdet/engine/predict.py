"""Run an exported model on image files, without DeepSpeed.

from giantdet import load_predictor
predictor = load_predictor("runs/demo")
predictor("image.jpg").save("picture.png")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import batched_nms
from tqdm import tqdm

from giantdet.architectures import Architecture
from giantdet.config.types import TtaConfig
from giantdet.data.images import limit_pixels
from giantdet.data.panoptic import PanopticMap
from giantdet.data.pixels import is_batch
from giantdet.data.views import image_batch, image_batches, no_targets, whole_image
from giantdet.engine.found import Found
from giantdet.engine.images import ImageLike, load_image, pixels_of
from giantdet.engine.tiles import kept_in_tile, shifted_rle, tiles_of
from giantdet.engine.tta import MultiScale, check_tta
from giantdet.errors import InputError
from giantdet.evaluation.coco import to_original
from giantdet.evaluation.panoptic import panoptic_map
from giantdet.evaluation.rle import Rle
from giantdet.evaluation.semantic import SemanticMaps
from giantdet.export import ExportConfig, load_detector
from giantdet.layers.precision import cast
from giantdet.structures import Batch, Detections, Outputs, joined

__all__ = [
    "Found",
    "Predictor",
    "image_batch",
    "image_batches",
    "load_image",
    "load_predictor",
    "no_targets",
]

Precision = Literal["float32", "bfloat16", "float16"]


class Predictor:
    """A model with the image size and the class names of its export; see `__call__`."""

    def __init__(
        self, detector: Architecture, config: ExportConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.detector, self.config, self.device = detector, config, device
        self.data = config.data_config()

    def __repr__(self) -> str:
        classes, (height, width) = self.config.classes, self.config.size
        return (
            f"Predictor of {self.config.model.type} on {self.device}: "
            f"{len({*classes.objects, *classes.semantic})} classes, canvas {height} x {width}; call it with "
            "(image, threshold=0.5, tile=None, tile_overlap=0.2, batch_size=1, tta=None)"
        )

    @overload
    def __call__(
        self,
        image: ImageLike,
        threshold: float = 0.5,
        tile: int | None = None,
        tile_overlap: float = 0.2,
        *,
        batch_size: int = 1,
        progress: bool = False,
        tta: TtaConfig | None = None,
    ) -> Found: ...
    @overload
    def __call__(
        self,
        image: list[Any] | tuple[Any, ...],
        threshold: float = 0.5,
        tile: int | None = None,
        tile_overlap: float = 0.2,
        *,
        batch_size: int = 1,
        progress: bool = False,
        tta: TtaConfig | None = None,
    ) -> list[Found]: ...

    def __call__(
        self,
        image: ImageLike | list[Any] | tuple[Any, ...],
        threshold: float = 0.5,
        tile: int | None = None,
        tile_overlap: float = 0.2,
        *,
        batch_size: int = 1,
        progress: bool = False,
        tta: TtaConfig | None = None,
    ) -> Found | list[Found]:
        """Return what is in an image: detections with a score of at least `threshold`, and maps.

        The image is a file, a PIL image, an array `[h, w]` or `[h, w, c]`, or a tensor `[c, h, w]`, with RGB
        values of 0 to 1, 0 to 255 or 16 bits; `pixels.rgb_pixels` has the rules. A list of them, or an array
        or tensor with four dimensions, gives a list. Raises InputError, a ValueError, in one line for
        anything else, and for a file that is not a readable image.

        Args:
            tile: a larger image is predicted in tiles of `tile` x `tile` of its pixels, which overlap by
                `tile_overlap` of their side; for models that predict only objects (`docs/prediction.md`).
            batch_size: images, tiles or windows that the model takes at a time.
            progress: show a bar over the tiles, if stderr is a terminal.
            tta: show the image at several scales and mirrored, and merge what is found; see `TtaConfig`.
        """
        if tta is not None:
            self.check_tta(tile)
        if tile is not None:
            self.check_tiles(tile, tile_overlap)
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        images: Any = image if is_batch(image) else [image]
        if any(map(is_batch, images)):
            raise InputError("a list of images contains another list; give a flat list")
        if tile is None:
            found = list(self._found(map(pixels_of, images), threshold, batch_size, tta))
        else:
            found = [
                self._in_tiles(pixels_of(one), threshold, tile, tile_overlap, batch_size, progress)
                for one in images
            ]
        found = [one._replace(image=given) for one, given in zip(found, images, strict=True)]
        return found if is_batch(image) else found[0]

    def check_tta(self, tile: int | None = None) -> None:
        """Raise InputError, a ValueError, for a model that cannot be shown images at several scales."""
        if tile is not None:
            raise InputError(
                "tta (--tta) shows whole images at several scales, and tile (--tile) parts of them: "
                "give one of the two"
            )
        check_tta(self.detector, self.config.window_stride)

    def check_tiles(self, tile: int, overlap: float) -> None:
        """Raise InputError, a ValueError, for tiles that are impossible, or not for this model."""
        tiles_of((1, 1), tile, overlap)
        if self.config.model.detections_nms_iou is None or "semantic" in self.detector.tasks:
            raise InputError(
                "tiles (--tile) are for models that predict only objects; this one predicts "
                f"{', '.join(self.detector.tasks)}; for semantic maps, eval.window_stride gives windows"
            )

    def _in_tiles(
        self,
        pixels: NDArray[np.uint8],
        threshold: float,
        side: int,
        overlap: float,
        batch_size: int,
        progress: bool,
    ) -> Found:
        """Return what is in an image, by tiles with a `side`: their detections after NMS by class.

        The model's limit of detections holds for each tile, and none for the image.
        """
        size_hw = (pixels.shape[0], pixels.shape[1])
        tiles = tiles_of(size_hw, side, overlap)
        parts = self._found(
            (pixels[tile.top : tile.bottom, tile.left : tile.right] for tile in tiles), threshold, batch_size
        )
        if len(tiles) == 1:
            return next(parts)
        bar = tqdm(parts, "tiles", len(tiles), False, dynamic_ncols=True, disable=None if progress else True)
        boxes, scores, labels = [], [], []
        rles: list[Rle] = []
        has_masks = False
        for tile, part in zip(tiles, bar, strict=True):
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
        # To keep classes apart, batched_nms adds up to classes x pixels to boxes, which float32 would round.
        best_D = batched_nms(boxes_D4.double(), scores_D.double(), labels_D, nms_iou)
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

    def _found(
        self,
        images: Iterable[NDArray[np.uint8]],
        threshold: float,
        batch_size: int,
        tta: TtaConfig | None = None,
    ) -> Iterator[Found]:
        """Yield what is in each image."""
        maps = SemanticMaps()
        answers = self._on_canvas(images, batch_size) if tta is None else self._in_scales(images, tta)
        for outputs, batch in answers:
            yield from (found for _, found in self.found_in(outputs, batch, maps, threshold))

    def found_in(
        self, outputs: Outputs, batch: Batch, maps: SemanticMaps, threshold: float
    ) -> Iterator[tuple[int, Found]]:
        """Yield (image id, what is in the image) for the images that a batch completes.

        `maps` keeps the windows of an image until its last one.
        """
        logits_BChw = outputs.semantic_BCHW
        complete = {} if logits_BChw is None else dict(maps.add(logits_BChw, batch))
        last_view = {number: b for b, number in enumerate(batch.image_ids_B.tolist()) if number >= 0}
        for number, b in last_view.items():
            if logits_BChw is None or number in complete:  # else the image has more windows
                found = self._found_in_view(outputs, batch, b, threshold)
                yield number, found._replace(semantic_HW=complete.get(number))

    def _on_canvas(
        self, images: Iterable[NDArray[np.uint8]], batch_size: int
    ) -> Iterator[tuple[Outputs, Batch]]:
        """Yield the outputs of batches of images, or of their windows."""
        views = (
            view
            for number, pixels in enumerate(images)
            for view in image_batches(pixels, self.data, self.config.window_stride, number)
        )
        while part := list(islice(views, batch_size)):
            batch = joined(part)
            yield self._outputs(batch), batch

    def _in_scales(
        self, images: Iterable[NDArray[np.uint8]], tta: TtaConfig
    ) -> Iterator[tuple[Outputs, Batch]]:
        """Yield the merged outputs of one image after another."""
        model = MultiScale(self.detector, self.config.model, tta, self.device, self.config.window_stride)
        for number, pixels in enumerate(images):
            yield model(whole_image(pixels, number))

    @torch.no_grad()
    def _outputs(self, batch: Batch) -> Outputs:
        outputs: Outputs = self.detector(batch.to(self.device))
        return outputs

    def _found_in_view(self, outputs: Outputs, batch: Batch, b: int, threshold: float) -> Found:
        """Return what is in image b of a batch, except its semantic map."""
        found = Found(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), [], [])
        if outputs.detections is not None:
            found = self._objects(outputs.detections, batch, b, threshold)
        if "panoptic" in self.detector.tasks:
            found = found._replace(panoptic=self._panoptic(outputs, batch, b))
        height, width = batch.original_sizes_B2[b].tolist()
        return found._replace(classes=self.config.classes, size_hw=(height, width))

    def _objects(self, detections: Detections, batch: Batch, b: int, threshold: float) -> Found:
        # A model may have more classes than names: those outputs mean nothing.
        named_BD = detections.labels_BD < len(self.config.categories)
        shown_BD = detections.valid_BD & named_BD & (detections.scores_BD >= threshold)
        detections = detections._replace(valid_BD=shown_BD)
        boxes_D4, rles_D = to_original(detections, batch, b, self.config.model.reference)
        chosen = detections.valid_BD[b]
        labels_D = detections.labels_BD[b][chosen].cpu()
        categories = [self.config.categories[label] for label in labels_D.tolist()]
        return Found(
            boxes_D4=boxes_D4,
            scores_D=detections.scores_BD[b][chosen].cpu(),
            labels_D=labels_D,
            names=[name for _, name in categories],
            category_ids=[number for number, _ in categories],
            rles_D=rles_D,
        )

    def _panoptic(self, outputs: Outputs, batch: Batch, b: int) -> PanopticMap:
        model, classes = self.config.model, self.config.classes
        categories = [*classes.objects, *classes.stuff]
        found = panoptic_map(
            outputs, batch, b, len(classes.objects), len(categories), model.reference, model.merge_rule
        )
        return found._replace(
            segments=[s._replace(category=categories[s.category][0]) for s in found.segments]
        )


def _known(device: torch.device | str) -> torch.device:
    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device}: PyTorch has no such device; give cpu, cuda or cuda:1") from error
    if known.type == "cuda" and (known.index or 0) >= (gpus := torch.cuda.device_count()):
        raise InputError(f"device {device}: PyTorch finds {gpus} GPUs on this machine")
    return known


def load_predictor(
    source: str | Path,
    device: torch.device | str | None = None,
    max_image_pixels: int | None = None,
    dtype: Precision | torch.dtype = "float32",
) -> Predictor:
    """Return a predictor for an export; without `device`, on the GPU if there is one.

    Args:
        source: folder of an export or of a run, or `hf_hub:OWNER/NAME` for one of the Hugging Face hub.
        device: "cpu", "cuda", "cuda:1" or another of PyTorch.
        max_image_pixels: lets this process read larger files than Pillow's limit of 178,956,970 pixels.
        dtype: type of weights and activations: "float32", "bfloat16" or "float16". Boxes, scores and maps are
            computed in float32.

    Raises InputError, a ValueError, for a folder that is not an export, and for a GPU that is not there.
    """
    if max_image_pixels is not None:
        limit_pixels(max_image_pixels)
    device = _known(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    detector, config = load_detector(source, device)
    cast(detector, _dtype(dtype))
    return Predictor(detector, config, device)


def _dtype(dtype: Precision | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in get_args(Precision):
        raise InputError(f"dtype {name}: give one of {', '.join(get_args(Precision))}")
    found: torch.dtype = getattr(torch, name)
    return found
