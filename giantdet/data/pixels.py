"""Convert an image (array, tensor, PIL image) to RGB bytes, or refuse it if its meaning is uncertain.

Shapes: h, w pixels · c channels: 1 is grey, 3 RGB, 4 RGBA, whose alpha is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from giantdet.errors import DataError

_CHANNELS = (1, 3, 4)


def rgb_pixels(image: Any) -> NDArray[np.uint8]:
    """Return a PIL image, an array or a tensor as RGB uint8 `[h, w, 3]`.

    Arrays are `[h, w]` or `[h, w, c]`, tensors `[h, w]` or `[c, h, w]`; each may be in the other order where
    only that one has a possible number of channels. Values are converted by `to_bytes`. Channels are taken as
    RGB: nothing tells them from OpenCV's BGR. A PIL image is rotated as its EXIF data say. Raises DataError,
    whose message has type and shape, for anything else.
    """
    if isinstance(image, Image.Image):
        return np.array(to_rgb(ImageOps.exif_transpose(image)))
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise DataError(
            f"{_described(image)} is not an image: give a file, a PIL image, an array, a tensor, or a list "
            "of them"
        )
    try:
        values, is_tensor = _array(image), isinstance(image, torch.Tensor)
        values_HWC = _channels_last(values, is_tensor)[..., :3]  # without alpha, which may have another range
        shape_HW3 = (*values_HWC.shape[:2], 3)  # grey has one channel
        return np.ascontiguousarray(np.broadcast_to(to_bytes(values_HWC), shape_HW3))
    except DataError as error:
        raise DataError(f"{_described(image)}: {error}") from None


def is_batch(image: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether this is a list or tuple of images, or an array or tensor with a dimension for them."""
    return isinstance(image, list | tuple) or (
        isinstance(image, np.ndarray | torch.Tensor) and image.ndim == 4
    )


def to_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Return pixel values as bytes, by their type and range.

    Bytes stay, and bool becomes 0 and 255. Floats up to 1 are scaled by 255; those up to 255 are rounded.
    uint16 is 16 bits, and wider integers are 8 or 16 bits. Raises DataError where the range does not tell:
    the picture might be black or white.
    """
    kind = values.dtype.kind
    if values.size == 0:
        raise DataError("it has no pixels")
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * 255
    if kind not in "iuf":
        raise DataError("its values are not numbers")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise DataError("it has values that are not finite")
    found = f"it has values from {low:.4g} to {high:.4g}"
    if low < 0:
        raise DataError(f"{found}: pixels are 0 to 1 or 0 to 255, without normalisation")
    if kind == "f":
        return _floats_to_bytes(values, high, found)
    # uint16 within a byte would be black, and int16 beyond a byte has no usual white.
    if (values.dtype == np.uint16 and 0 < high <= 255) or (values.dtype == np.int16 and high > 255):
        raise DataError(f"{found}: give 8 bits, 0 to 255, or 16 bits, 0 to 65535 as uint16")
    if high <= 255:
        return values.astype(np.uint8)
    if high > 65535:
        raise DataError(f"{found}: give 8 bits, 0 to 255, or 16 bits, 0 to 65535")
    return ((values.astype(np.int64) + 128) // 257).astype(np.uint8)


def _floats_to_bytes(values: NDArray[Any], high: float, found: str) -> NDArray[np.uint8]:
    values = values.astype(np.float64 if values.dtype.itemsize > 4 else np.float32)
    if high <= 1:
        return np.asarray(np.rint(values * 255), np.uint8)
    if 2 <= high <= 255:
        return np.asarray(np.rint(values), np.uint8)
    raise DataError(f"{found}, which is neither 0 to 1 nor 0 to 255: scale it to one of them")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a PIL image of any mode as RGB; 16-bit grey is scaled to 8 bits, alpha is dropped.

    Raises DataError, which names the mode, where that has no certain meaning.
    """
    # The modes of 16-bit PNG and TIFF files; older versions of Pillow open such a PNG with 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        wide = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):  # 32-bit integers and floats
        try:
            image = Image.fromarray(to_bytes(np.asarray(image)))
        except DataError as error:
            kind = "floats" if image.mode == "F" else "integers"
            raise DataError(f"grey of 32-bit {kind} (mode {image.mode}): {error}") from None
    if image.mode == "RGB":
        return image
    try:
        return image.convert("RGB")
    except ValueError:
        raise DataError(f"its mode {image.mode} cannot be converted to RGB; convert the file") from None


def _array(image: Any) -> NDArray[Any]:
    if not isinstance(image, torch.Tensor):
        return np.asarray(image)
    tensor = image.detach().cpu()
    if tensor.is_sparse or tensor.is_quantized or tensor.is_complex():
        raise DataError("its values are not plain numbers")
    # numpy has neither bfloat16 nor the floats of 8 bits.
    return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())


def _channels_last(values: NDArray[Any], is_tensor: bool) -> NDArray[Any]:
    """Return `[h, w, c]` of an image in either order."""
    if values.ndim == 2:
        return values[..., None]
    if values.ndim != 3:
        raise DataError("an image has two dimensions, or three with the channels")
    first, last = values.shape[0] in _CHANNELS, values.shape[2] in _CHANNELS
    if not first and not last:
        raise DataError("an image has 1, 3 or 4 channels, as its first or its last dimension")
    return values.transpose(1, 2, 0) if first and (is_tensor or not last) else values


def _described(image: Any) -> str:
    """Return type and shape in words: never the values, of which there are millions."""
    kind = type(image)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(image, torch.Tensor | np.ndarray):
        return f"{name} of {image.dtype} {list(image.shape)}"
    return f"an object of type {name}"
