"""Read image files as RGB, in the size that their record says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from giantdet.errors import DataError

IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
"""Names of image files, in lower case."""
_ORIENTATION = 0x0112  # EXIF tag


def read_image(path: Path, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Return an image file as RGB uint8 [h, w, 3], of `size_hw`.

    EXIF rotation is applied if the size is that of the rotated image (as label tools and
    browsers show it), and ignored if only the stored size fits (as in COCO itself). If both fit, for a
    square or a half turn, it is applied, as in detectron2. Alpha is dropped, the colours under it are
    kept; grey, palette and CMYK images become RGB; 16-bit grey is scaled to 8 bits.
    Raises `DataError`, which names the file, if it cannot be read or has another size.
    """
    with named(path), Image.open(path) as file:
        return np.array(to_rgb(orient(file, size_hw)))


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Raise any error of reading an image file as a `DataError` that names the file."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to RGB; see `read_image`."""
    if image.mode.startswith("I"):  # I;16, I;16B, and I, the modes of 16-bit PNG and TIFF files
        wide = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
