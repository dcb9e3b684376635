"""Read image files as RGB, in the size that their record says."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg

from giantdet.data.pixels import to_rgb
from giantdet.data.records import logger
from giantdet.errors import DataError

# Formats that Pillow recognises, but cannot read by itself: it lacks the decoder or needs another program.
_UNREADABLE = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
_ORIENTATION = 0x0112  # EXIF tag
_named_frames = False  # whether this process has named a file of several frames


@functools.cache
def image_endings() -> frozenset[str]:
    """Return the endings of image files that the installed Pillow reads, in lower case with their dot."""
    endings = Image.registered_extensions()  # imports all of Pillow's formats
    known = {ending for ending, name in endings.items() if name in Image.OPEN and name not in _UNREADABLE}
    return frozenset(ending.lower() for ending in known)


def limit_pixels(most: int) -> None:
    """Let this process read images of up to `most` pixels; larger ones are refused unread.

    The limit guards against small files that decompress to gigabytes. Pillow keeps it in a global variable,
    warns beyond it, and refuses beyond twice its value.
    """
    limit = (most + 1) // 2
    if limit == Image.MAX_IMAGE_PIXELS:
        return
    Image.MAX_IMAGE_PIXELS = limit
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: Path, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Return an image file as RGB uint8 [h, w, 3], of `size_hw`.

    EXIF rotation is applied if the size is that of the rotated image (as label tools and
    browsers show it), and ignored if only the stored size fits (as in COCO itself). If both fit, for a
    square or a half turn, it is applied, as in detectron2. Alpha is dropped, the colours under it are
    kept; grey, palette and CMYK images become RGB; 16-bit grey is scaled to 8 bits. Of a file with several
    frames the first is read. 32-bit grey is converted by `pixels.to_bytes`.
    Raises `DataError`, which names the file, if it cannot be read or has another size.
    """
    with named(path), Image.open(path) as file:
        image = orient(file, size_hw)
        pixels_HW3 = _decode_jpeg(path, file) if image is file else None
        if pixels_HW3 is None:
            pixels_HW3 = np.array(to_rgb(image))
        if has_frames(file):
            _name_once(path)
        return pixels_HW3


def _decode_jpeg(path: Path, header: Image.Image) -> NDArray[np.uint8] | None:
    """Return the pixels of a JPEG file, or None where Pillow must read it.

    torchvision uses libjpeg-turbo as Pillow does, with the same result (tested), but without Pillow's copies.
    It refuses more broken files; those are left to Pillow, which reads them or says what is wrong.
    """
    if header.format != "JPEG" or header.mode not in ("RGB", "L"):
        return None
    try:
        content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        pixels_3HW = decode_jpeg(content, ImageReadMode.RGB)
    except RuntimeError:  # also if torchvision was built without libjpeg
        return None
    pixels_HW3: NDArray[np.uint8] = pixels_3HW.permute(1, 2, 0).numpy()  # contiguous: how libjpeg wrote it
    return pixels_HW3


def has_frames(image: Image.Image) -> bool:
    """Return whether a file holds several pictures. Previews in photos (MPO) do not count."""
    try:
        return bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    except Exception:  # a broken second frame: PIL's plugins raise any exception
        return True


def _name_once(path: Path) -> None:
    global _named_frames
    if not _named_frames:
        _named_frames = True
        logger.warning(
            "%s has several frames, only the first is read; further files of this kind are not named", path
        )


def bomb_text(error: Image.DecompressionBombError) -> str:
    """Return Pillow's refusal of a large image, and how to allow it."""
    return (
        f"{str(error).rstrip('.')}; if you trust the file, raise data.max_image_pixels in the JSON, "
        "--max-image-pixels of the command, or the max_image_pixels of load_predictor"
    )


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Raise any error of reading an image file as a `DataError` that names the file."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {bomb_text(error)}") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise any exception on broken files
        raise DataError(f"{path}: {type(error).__name__} {error}") from error


def orient(image: Image.Image, size_hw: tuple[int, int]) -> Image.Image:
    """Return `image`, rotated by EXIF if that gives `size_hw`, else as it is; otherwise `DataError`."""
    stored = (image.height, image.width)
    orientation = image.getexif().get(_ORIENTATION, 1)
    rotated = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    if rotated == size_hw:
        return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image
    if stored == size_hw:
        return image
    raise DataError(f"the file is {rotated[1]} x {rotated[0]}, its record says {size_hw[1]} x {size_hw[0]}")
