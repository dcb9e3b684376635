"""Geometric transforms: scale, crop and flip an image onto the top left of a fixed canvas.

One `Geometry` describes the transform of an image, its boxes and its masks. Training draws it at random:
multi-scale (detectron2's ResizeShortestEdge), large-scale jitter (Ghiasi et al. 2021, as in detectron2's
ResizeScale and FixedSizeCrop) or a random scale and crop (mmsegmentation's RandomResize and RandomCrop), and
flips. In evaluation it is deterministic.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from giantdet.config.types import DataConfig
from giantdet.structures import IGNORE

MIN_SIDE = 1.0  # pixels on the canvas; narrower boxes are dropped
_MOST_RESIZED = 4  # pixels that torch may resize per pixel of the crop; Pillow is as fast then


class Geometry(NamedTuple):
    """The map from pixels of the original image to the canvas: scale, then flips, then subtract the offset.

    All sizes are (height, width). The scales of the axes differ slightly, because sizes are whole numbers.
    """

    source_hw: tuple[int, int]
    resized_hw: tuple[int, int]  # the whole image after scaling
    offset_yx: tuple[int, int]  # of the crop in the resized and flipped image
    size_hw: tuple[int, int]  # of the crop: the part of the canvas that holds the image
    flip: bool  # left and right
    flip_y: bool = False  # top and bottom

    @property
    def scale_yx(self) -> tuple[float, float]:
        return self.resized_hw[0] / self.source_hw[0], self.resized_hw[1] / self.source_hw[1]

    @property
    def flip_yx(self) -> tuple[bool, bool]:
        return self.flip_y, self.flip

    def source_range(
        self, axis: int, lo: NDArray[Any], hi: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Map intervals [lo, hi] of the canvas along axis 0 (y) or 1 (x) to the original image."""
        lo, hi = lo + self.offset_yx[axis], hi + self.offset_yx[axis]
        if self.flip_yx[axis]:
            lo, hi = self.resized_hw[axis] - hi, self.resized_hw[axis] - lo
        return lo / self.scale_yx[axis], hi / self.scale_yx[axis]


def draw_geometry(
    rng: np.random.Generator, image_hw: tuple[int, int], config: DataConfig, training: bool
) -> Geometry:
    """Return the geometry of one sample. In evaluation `rng` is not used.

    `jitter` (of the scale that fills the canvas) and `scale` (of `short_side`) are followed by a random crop.
    Without them the whole image is kept: it is scaled to the short side, or less so that it fits.
    """
    (height, width), (canvas_h, canvas_w) = image_hw, config.size
    augment = config.augment
    fit, short = min(canvas_h / height, canvas_w / width), config.short_side
    fit = min(fit, (config.long_side or math.inf) / max(height, width))
    cropped = training and (augment.jitter is not None or augment.scale is not None)
    if training and augment.jitter is not None:
        scale = fit * rng.uniform(*augment.jitter)
    elif training and augment.scale is not None:
        scale = short / min(height, width) * rng.uniform(*augment.scale)
    else:
        if training and augment.short_sides:
            short = int(rng.choice(augment.short_sides))
        scale = min(short / min(height, width), fit)
    resized_h, resized_w = scaled(image_hw, scale)
    if not cropped:
        resized_h, resized_w = min(resized_h, canvas_h), min(resized_w, canvas_w)
    geometry = Geometry(
        image_hw, (resized_h, resized_w), (0, 0), (min(resized_h, canvas_h), min(resized_w, canvas_w)), False
    )
    if cropped:
        geometry = draw_crop(rng, geometry)
    geometry = geometry._replace(flip=training and bool(rng.random() < augment.flip))
    # Without vertical flips no number is drawn for them: what is drawn later, colours for example, stays.
    if training and augment.vertical_flip > 0:
        geometry = geometry._replace(flip_y=bool(rng.random() < augment.vertical_flip))
    return geometry


def scaled(size_hw: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return a size times `scale`, rounded to whole pixels, at least 1."""
    return max(int(size_hw[0] * scale + 0.5), 1), max(int(size_hw[1] * scale + 0.5), 1)


def draw_crop(rng: np.random.Generator, geometry: Geometry) -> Geometry:
    """Return the geometry with its crop somewhere in the image."""
    (resized_h, resized_w), (crop_h, crop_w) = geometry.resized_hw, geometry.size_hw
    top = int(rng.integers(resized_h - crop_h + 1))
    return geometry._replace(offset_yx=(top, int(rng.integers(resized_w - crop_w + 1))))


def draw_balanced_crop(
    rng: np.random.Generator, geometry: Geometry, map_hw: NDArray[np.uint8], share: float
) -> Geometry:
    """Return the geometry with a crop in which no class has `share` or more of the labelled pixels.

    A crop of one class is not balanced. After 10 more crops the last is taken (mmsegmentation's RandomCrop).
    """
    for _ in range(10):
        counts = np.bincount(transform_semantic(map_hw, geometry, geometry.size_hw).ravel(), minlength=256)
        counts = np.delete(counts, IGNORE)
        if np.count_nonzero(counts) > 1 and counts.max() < share * counts.sum():
            break
        geometry = draw_crop(rng, geometry)
    return geometry


def windows(image_hw: tuple[int, int], config: DataConfig, stride: int) -> list[Geometry]:
    """Return windows of the canvas' size, `stride` apart, over the image scaled to `short_side`.

    The last of each row and column ends at the border (mmsegmentation's `slide_inference`).
    """
    resized = scaled(image_hw, config.short_side / min(image_hw))
    size = (min(resized[0], config.size[0]), min(resized[1], config.size[1]))
    offsets = [
        [min(i * stride, whole - part) for i in range(-(-(whole - part) // stride) + 1)]
        for whole, part in zip(resized, size, strict=True)
    ]
    return [Geometry(image_hw, resized, (y, x), size, False) for y in offsets[0] for x in offsets[1]]


def window_row(views: list[Geometry], number: int) -> tuple[int, ...]:
    """Return the row of `Batch.windows_B6` for one of the windows of an image."""
    view = views[number]
    return (*view.offset_yx, *view.resized_hw, number, len(views))


def transform_image(
    image_hw3: NDArray[np.uint8], geometry: Geometry, canvas_hw: tuple[int, int], exact: bool
) -> NDArray[np.uint8]:
    """Return the canvas with `scaled_crop`, uint8 [H, W, 3], zero outside the image."""
    return _onto(np.zeros((*canvas_hw, 3), np.uint8), scaled_crop(image_hw3, geometry, exact))


def scaled_crop(image_hw3: NDArray[np.uint8], geometry: Geometry, exact: bool) -> NDArray[np.uint8]:
    """Return the part of the canvas that holds the image, uint8 [*size_hw, 3]. Bilinear and antialiased.

    `exact`, in evaluation and prediction, is Pillow's filter, as in detectron2. Otherwise torch's vectorised
    filter for bytes does the same work in a fifth of the time. Its weights have 16 bits, so that values
    differ from Pillow's by at most 2 of 255, by less than 0.1 on average (tested).
    """
    (top, left), (height, width) = geometry.offset_yx, geometry.size_hw
    if geometry.resized_hw == geometry.source_hw:
        return _crop(image_hw3, geometry)
    if exact or (top + height) * (left + width) > _MOST_RESIZED * height * width:
        return _resize_window(image_hw3, geometry, Image.Resampling.BILINEAR)
    # torch resizes from the corner of an image only: what is above and left of the crop comes with it. Input
    # that the filter does not reach is cut off.
    scale_yx = [np.nextafter(scale, np.inf) for scale in geometry.scale_yx]  # so that no last row is lost
    rows, columns = (
        min(math.ceil((start + size) / scale + max(1 / scale, 1)) + 1, whole)
        for start, size, scale, whole in zip(
            geometry.offset_yx, geometry.size_hw, scale_yx, geometry.source_hw, strict=True
        )
    )
    # Slicing from the other end and then flipping is faster than flipping the larger result.
    y, x = (
        slice(whole - size, whole) if flip else slice(size)
        for size, whole, flip in zip((rows, columns), geometry.source_hw, geometry.flip_yx, strict=True)
    )
    source_13HW = torch.from_numpy(_flipped(image_hw3[y, x], geometry))[None].permute(0, 3, 1, 2)
    resized_13HW = F.interpolate(source_13HW, scale_factor=scale_yx, mode="bilinear", antialias=True)
    resized_HW3: NDArray[np.uint8] = resized_13HW[0].permute(1, 2, 0).numpy()
    return resized_HW3[top : top + height, left : left + width]


def transform_semantic(
    map_hw: NDArray[np.uint8], geometry: Geometry, canvas_hw: tuple[int, int]
) -> NDArray[np.uint8]:
    """Return the canvas, uint8 [H, W], `IGNORE` outside the image. Nearest neighbour (PIL)."""
    same = geometry.resized_hw == geometry.source_hw
    part = _crop(map_hw, geometry) if same else _resize_window(map_hw, geometry, Image.Resampling.NEAREST)
    return _onto(np.full(canvas_hw, IGNORE, np.uint8), part)


def _onto(canvas: NDArray[np.uint8], part: NDArray[np.uint8]) -> NDArray[np.uint8]:
    canvas[: part.shape[0], : part.shape[1]] = part
    return canvas


def _flipped(pixels: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """Return pixels, mirrored if the geometry is, that can be written: torch takes no others."""
    axes = tuple(axis for axis in (0, 1) if geometry.flip_yx[axis])
    if not axes:
        return pixels if pixels.flags.writeable else pixels.copy()
    if not pixels.flags.writeable:
        return np.ascontiguousarray(np.flip(pixels, axes))
    flipped: NDArray[np.uint8] = torch.from_numpy(pixels).flip(axes).numpy()  # much faster than NumPy's
    return flipped


def _crop(source: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    (top, left), (height, width) = geometry.offset_yx, geometry.size_hw
    if geometry.flip_y:
        top = source.shape[0] - top - height
    if geometry.flip:
        left = source.shape[1] - left - width
    return _flipped(source[top : top + height, left : left + width], geometry)


def _resize_window(
    source: NDArray[np.uint8], geometry: Geometry, filter_: Image.Resampling
) -> NDArray[np.uint8]:
    """Resize only the window of the original that ends up in the crop, with Pillow.

    Its filter still reads the pixels around the window.
    """
    height, width = geometry.size_hw
    y = geometry.source_range(0, np.array(0.0), np.array(float(height)))
    x = geometry.source_range(1, np.array(0.0), np.array(float(width)))
    source_h, source_w = geometry.source_hw
    window = (
        max(float(x[0]), 0.0),
        max(float(y[0]), 0.0),
        min(float(x[1]), source_w),
        min(float(y[1]), source_h),
    )
    return _flipped(np.array(Image.fromarray(source).resize((width, height), filter_, box=window)), geometry)


def transform_boxes(boxes_N4: NDArray[Any], geometry: Geometry) -> NDArray[np.float64]:
    """Map boxes xyxy of the original image to the canvas, without clipping."""
    (scale_y, scale_x), (top, left) = geometry.scale_yx, geometry.offset_yx
    x0, y0, x1, y1 = boxes_N4.astype(np.float64).T * np.array([scale_x, scale_y, scale_x, scale_y])[:, None]
    if geometry.flip:
        x0, x1 = geometry.resized_hw[1] - x1, geometry.resized_hw[1] - x0
    if geometry.flip_y:
        y0, y1 = geometry.resized_hw[0] - y1, geometry.resized_hw[0] - y0
    return np.stack([x0 - left, y0 - top, x1 - left, y1 - top], axis=1)


def clip_boxes(boxes_N4: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
    """Clip boxes on the canvas to the part that holds the image.

    A cropped object's box is the clipped box, not the box of its remaining mask, as in detectron2.
    """
    height, width = geometry.size_hw
    clipped: NDArray[Any] = np.clip(boxes_N4, 0, np.array([width, height, width, height]))
    return clipped


def sides_ok(boxes_N4: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which boxes have no side below `MIN_SIDE`."""
    ok_N: NDArray[np.bool_] = (boxes_N4[:, 2:] - boxes_N4[:, :2] >= MIN_SIDE).all(axis=1)
    return ok_N
