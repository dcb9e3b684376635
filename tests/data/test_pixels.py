"""Arrays, tensors and pictures as images: interpreted as intended, or refused in one line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from giantdet.data.images import image_endings, read_image
from giantdet.data.pixels import is_batch, rgb_pixels
from giantdet.engine.predict import load_image

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
RGB[0, 0], RGB[0, 1] = 0, 255  # the whole range
GREY = RGB[..., 0]
ALPHA = np.concatenate([RGB, np.full((20, 30, 1), 7, np.uint8)], -1)
THREE = np.stack([GREY] * 3, -1)
UNIT = RGB.astype(np.float32) / 255
CHW = torch.from_numpy(RGB).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (RGB, RGB),
        (RGB[:, :, ::-1][:, :, ::-1], RGB),
        (UNIT, RGB),
        (UNIT.astype(np.float64), RGB),
        (RGB.astype(np.float32), RGB),
        (RGB.astype(np.float16), RGB),
        (RGB.astype(np.int64), RGB),
        (RGB.astype(np.int16), RGB),
        (RGB.astype(np.uint16) * 257, RGB),
        (RGB > 127, np.where(RGB > 127, 255, 0)),
        (GREY, THREE),
        (GREY[..., None], THREE),
        (GREY[None], THREE),
        (GREY.astype(np.float32) / 255, THREE),
        (ALPHA, RGB),
        (np.concatenate([UNIT, np.full((20, 30, 1), 255, np.float32)], -1), RGB),
        (RGB.transpose(2, 0, 1), RGB),
        (CHW, RGB),
        (CHW.float() / 255, RGB),
        ((CHW.float() / 255).requires_grad_(), RGB),
        (CHW.to(torch.int64), RGB),
        (torch.from_numpy(RGB), RGB),
        (torch.from_numpy(GREY), THREE),
        (torch.from_numpy(ALPHA).permute(2, 0, 1), RGB),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(ALPHA), RGB),
        (Image.fromarray(GREY), THREE),
        (Image.fromarray(GREY.astype(np.uint16) * 257), THREE),
        (Image.fromarray(GREY.astype(np.float32) / 255), THREE),
        (Image.fromarray(GREY.astype(np.int32)), THREE),
    ],
)
def test_interpreted_as_intended(image: Any, expected: Any) -> None:
    found = rgb_pixels(image)
    assert found.dtype == np.uint8 and found.shape == (20, 30, 3) and found.flags.c_contiguous
    assert np.array_equal(found, expected)


NORMAL = (UNIT - 0.45) / 0.225


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (NORMAL, "numpy.ndarray of float32 [20, 30, 3]: it has values from -2 to 2.444: pixels are 0"),
        (CHW.float() - 3, "torch.Tensor of torch.float32 [3, 20, 30]: it has values from -3 to 252"),
        (UNIT * 1.5, "from 0 to 1.5, which is neither 0 to 1 nor 0 to 255"),
        (RGB.astype(np.float32) * 257, "from 0 to 6.554e+04, which is neither"),
        (RGB + np.float32(0.25), "from 0.25 to 255.2, which is neither"),
        (np.where(RGB > 127, np.nan, UNIT), "values that are not finite"),
        (np.where(RGB > 127, np.inf, UNIT), "values that are not finite"),
        (RGB.astype(np.uint16), "give 8 bits, 0 to 255, or 16 bits"),
        (RGB.astype(np.int16) * 100, "give 8 bits, 0 to 255, or 16 bits"),
        (RGB.astype(np.int32) * 1000, "give 8 bits, 0 to 255, or 16 bits"),
        (RGB.astype(np.int32) - 1, "from -1 to 254"),
        (np.zeros((20, 30, 2), np.uint8), "an image has 1, 3 or 4 channels"),
        (np.zeros((20, 30, 5), np.uint8), "an image has 1, 3 or 4 channels"),
        (np.zeros(20, np.uint8), "two dimensions, or three"),
        (np.zeros((0, 30, 3), np.uint8), "no pixels"),
        (np.array([["a"]]), "its values are not numbers"),
        (np.array([[1j]]), "its values are not numbers"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "not plain numbers"),
        (None, "an object of type NoneType is not an image"),
        ({"image": RGB}, "an object of type dict is not an image"),
        (7, "an object of type int"),
        (Image.fromarray(NORMAL[..., 0].astype(np.float32)), "32-bit floats (mode F): it has values from -2"),
        (Image.fromarray(GREY.astype(np.int32) * 1000), "32-bit integers (mode I)"),
    ],
)
def test_refused_in_one_line_without_the_values(image: Any, words: str) -> None:
    with pytest.raises(ValueError) as raised:
        rgb_pixels(image)
    message = str(raised.value)
    assert words in message and "\n" not in message and len(message) < 220, message


def test_batches() -> None:
    assert is_batch([RGB]) and is_batch((RGB,)) and is_batch(RGB[None]) and is_batch(CHW[None])
    assert not is_batch(RGB) and not is_batch("a.png") and not is_batch(Image.fromarray(RGB))


@pytest.mark.parametrize(
    ("values", "bright"),
    [
        (GREY.astype(np.float32) / 255, True),
        (GREY.astype(np.float32), True),
        (GREY.astype(np.float32) * 257, False),
        (GREY.astype(np.int32), True),
        (GREY.astype(np.int32) * 257, True),
        (GREY.astype(np.float32) - 1000, False),
        (GREY.astype(np.int32) * 100_000, False),
    ],
)
def test_tiffs_of_32_bits_are_never_black(tmp_path: Path, values: Any, bright: bool) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    assert Image.open(path).mode in ("F", "I")
    for read in (load_image, lambda path: read_image(path, (20, 30))):
        if bright:
            assert np.array_equal(read(path), THREE)
        else:
            with pytest.raises(ValueError, match=r"a\.tif.* of 32-bit (floats|integers)"):
                read(path)


def test_suffixes_are_those_that_pillow_reads(tmp_path: Path) -> None:
    """Save and read a picture with each suffix; formats for which Pillow has only a stub are not images."""
    endings = image_endings()
    assert {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jfif"} <= endings
    assert (".avif" in endings) == (find_spec("PIL._avif") is not None), "where Pillow was built with it"
    assert not endings & {".pdf", ".mp4", ".mpg", ".hdf", ".h5", ".eps", ".wmf", ".json", ".txt", ".npy", ""}
    tried = 0
    for ending in sorted(endings):
        path = tmp_path / f"a{ending}"
        try:
            Image.fromarray(RGB).save(path)
        except (KeyError, OSError, ValueError, SystemError):
            continue  # Pillow cannot write it, or not in RGB
        tried += 1
        assert load_image(path).shape[-1] == 3, ending
    assert tried > 15
