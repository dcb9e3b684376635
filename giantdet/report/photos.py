"""Photographs with objects or maps drawn on them, as JPEG of the size that a page needs."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_util

from giantdet.config.classes import Classes
from giantdet.data.samples import Sample
from giantdet.engine.draw import draw
from giantdet.engine.found import Found
from giantdet.evaluation.rle import Rle, decode_mask

_SIDE = 600  # pixels of the longer side
_DRAWN_SIDE = 1200  # of a larger image when it is drawn on, before it gets its size on the page
_MASK_PIXELS = 50_000_000
_QUALITY = 80

Color = tuple[int, int, int]


class Photo(NamedTuple):
    """A picture for the page."""

    jpeg: bytes
    size: tuple[int, int]  # width, height

    @classmethod
    def of(cls, image: Image.Image) -> Photo:
        """Return a picture."""
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=_QUALITY, optimize=True)
        return cls(file.getvalue(), image.size)


def drawn(image: NDArray[np.uint8], found: Found, scores: bool = True) -> Image.Image:
    """Return the image with what was found on it, no larger than a page needs; a truth has no `scores`."""
    picture = draw(*_shrunk(image, found), scores=scores)
    scale = _SIDE / max(picture.size)
    if scale >= 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _shrunk(image: NDArray[np.uint8], found: Found) -> tuple[NDArray[np.uint8], Found]:
    """Return a large image at the size at which it is drawn, with what was found in it.

    Objects of an image above `_MASK_PIXELS` lose their masks: hundreds of large bitmaps take minutes.
    """
    height, width = image.shape[:2]
    scale = _DRAWN_SIDE / max(height, width)
    if scale >= 1:
        return image, found
    size = max(1, round(width * scale)), max(1, round(height * scale))

    def small(map_HW: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(Image.fromarray(map_HW).resize(size, Image.Resampling.NEAREST))

    if found.semantic_HW is not None:
        found = found._replace(
            semantic_HW=torch.from_numpy(small(found.semantic_HW.int().numpy()).copy()).long()
        )
    if found.panoptic is not None:
        found = found._replace(panoptic=found.panoptic._replace(ids_HW=small(found.panoptic.ids_HW)))
    if found.rles_D is not None:
        few = height * width <= _MASK_PIXELS
        rles = (
            [_encoded(small(decode_mask(rle).numpy().astype(np.uint8))) for rle in found.rles_D]
            if few
            else None
        )
        found = found._replace(rles_D=rles)
    sides_4 = torch.tensor([size[0] / width, size[1] / height] * 2)
    found = found._replace(boxes_D4=found.boxes_D4 * sides_4, size_hw=(size[1], size[0]))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)), found


def objects_found(
    boxes_N4: NDArray[np.float64],
    labels_N: NDArray[np.int64],
    scores_N: NDArray[np.float64],
    rles: list[Rle] | None,
    classes: Classes,
    size_hw: tuple[int, int],
) -> Found:
    """Return objects for `draw`; boxes are left, top, width, height in pixels of the image."""
    boxes = np.concatenate([boxes_N4[:, :2], boxes_N4[:, :2] + boxes_N4[:, 2:]], 1)
    categories = [classes.objects[k] for k in labels_N.tolist()]
    return Found(
        torch.from_numpy(boxes).float(),
        torch.from_numpy(scores_N).float(),
        torch.from_numpy(labels_N),
        [name for _, name in categories],
        [number for number, _ in categories],
        rles,
        classes=classes,
        size_hw=size_hw,
    )


def map_found(map_HW: NDArray[np.uint8], classes: Classes) -> Found:
    """Return a semantic map for `draw`."""
    none = torch.zeros(0)
    return Found(
        none.view(0, 4),
        none,
        none.long(),
        [],
        [],
        semantic_HW=torch.from_numpy(map_HW.astype(np.int64)),
        classes=classes,
    )


def sample_found(sample: Sample, classes: Classes) -> Found:
    """Return the targets of a training sample for `draw`: its objects, or the semantic map without any.

    Boxes and masks are those of the augmented image; a mask is its bitmap in its frame.
    """
    height, width = sample.image_hw3.shape[:2]
    if not len(sample.labels_N) and sample.semantic_HW.size:
        return map_found(sample.semantic_HW[:height, :width], classes)
    boxes_N4 = sample.boxes_N4.astype(np.float64)
    boxes_N4[:, 2:] -= boxes_N4[:, :2]
    rles = None
    if sample.masks_NSS.shape[-1]:
        pairs = zip(sample.masks_NSS, sample.frames_N4, strict=True)
        rles = [_mask(bitmap_SS, frame_4, (height, width)) for bitmap_SS, frame_4 in pairs]
    return objects_found(
        boxes_N4,
        sample.labels_N.astype(np.int64),
        np.ones(len(boxes_N4)),
        rles,
        classes,
        (height, width),
    )


def _mask(bitmap_SS: NDArray[np.uint8], frame_4: NDArray[np.float32], size_hw: tuple[int, int]) -> Rle:
    """Return the mask of a bitmap, at least half covered, that tiles its frame of the image."""
    height, width = size_hw
    side = len(bitmap_SS)
    x0, y0, x1, y1 = (float(value) for value in frame_4)
    mask_HW = np.zeros(size_hw, np.uint8)
    if x1 > x0 and y1 > y0:
        column_W = np.floor((np.arange(width) + 0.5 - x0) / (x1 - x0) * side).astype(int)
        row_H = np.floor((np.arange(height) + 0.5 - y0) / (y1 - y0) * side).astype(int)
        inside_W, inside_H = (column_W >= 0) & (column_W < side), (row_H >= 0) & (row_H < side)
        part = bitmap_SS[np.ix_(row_H[inside_H], column_W[inside_W])] >= 128
        mask_HW[np.ix_(inside_H, inside_W)] = part
    return _encoded(mask_HW)


def _encoded(mask_HW: NDArray[np.uint8]) -> Rle:
    rle: Rle = mask_util.encode(np.asfortranarray(mask_HW))
    return rle | {"counts": rle["counts"].decode("ascii")}
