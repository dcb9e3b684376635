"""Images in all forms that a predictor takes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from giantdet.data.images import bomb_text, has_frames
from giantdet.data.pixels import rgb_pixels, to_rgb
from giantdet.errors import InputError

logger = logging.getLogger("giantdet")
ImageLike = str | os.PathLike[str] | IO[bytes] | Image.Image | NDArray[Any] | Tensor
"""A file, or what `pixels.rgb_pixels` takes."""


def pixels_of(image: ImageLike) -> NDArray[np.uint8]:
    """Return an image in any form as uint8 RGB `[h, w, 3]`. Raises InputError, a ValueError, otherwise."""
    given: Any = image
    is_file = isinstance(given, str | os.PathLike) or hasattr(given, "read")
    return load_image(given) if is_file else rgb_pixels(given)


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
                logger.warning("%s has several frames, only the first is read", path)
            return pixels_HW3
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {bomb_text(error)}") from error
    except Exception as error:  # PIL's plugins raise exceptions of many types for broken files
        raise InputError(f"{path}: not a readable image ({error})") from error
