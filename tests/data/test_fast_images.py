"""torch's resizing and torchvision's JPEG decoder against Pillow, the reference for both."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from giantdet.config.types import AugmentConfig, DataConfig
from giantdet.data import images
from giantdet.data.coco import CocoDataset
from giantdet.data.images import read_image
from giantdet.data.loader import train_loader
from giantdet.data.transforms import Geometry, draw_geometry, transform_image
from giantdet.errors import DataError

JITTER = DataConfig(size=(512, 512), augment=AugmentConfig(jitter=(0.1, 2.0)))
SHORT = DataConfig(size=(512, 512), short_side=400)


def by_pillow(image_hw3: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """Return the crop of an image that Pillow resized as a whole."""
    height, width = geometry.resized_hw
    whole = np.asarray(Image.fromarray(image_hw3).resize((width, height), Image.Resampling.BILINEAR))
    (top, left), (rows, columns) = geometry.offset_yx, geometry.size_hw
    whole = whole[:, ::-1] if geometry.flip else whole
    return (whole[::-1] if geometry.flip_y else whole)[top : top + rows, left : left + columns]


@pytest.mark.parametrize("config", [JITTER, SHORT], ids=["jitter", "short side"])
def test_resizing_equals_pillow_within_two_levels(shared: Path, config: DataConfig) -> None:
    folder = shared / "data/coco_panoptic200"
    dataset = CocoDataset(folder / "annotations/instances_val.json", folder / "images")
    rng = np.random.default_rng(0)
    seen = []
    for i in range(24):
        geometry = draw_geometry(rng, tuple(int(side) for side in dataset.sizes_hw[i]), config, True)
        image = dataset.read_image(i)
        (height, width), canvas = geometry.size_hw, transform_image(image, geometry, config.size, exact=False)
        assert not canvas[height:].any() and not canvas[:, width:].any()
        difference = np.abs(canvas[:height, :width].astype(int) - by_pillow(image, geometry))
        assert difference.max() <= 2 and difference.mean() < 0.1
        seen.append((geometry.flip, geometry.offset_yx != (0, 0)))
    assert {flip for flip, _ in seen} == {True, False}
    assert config is SHORT or {crop for _, crop in seen} == {True, False}


def test_evaluation_resizes_with_pillow() -> None:
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    geometry = Geometry((37, 53), (91, 130), (0, 0), (91, 130), False)
    canvas = transform_image(image, geometry, (96, 160), exact=True)
    assert (canvas[:91, :130] == by_pillow(image, geometry)).all()


@pytest.mark.parametrize("flip_y", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_at_borders_and_far_from_the_corner(flip: bool, flip_y: bool) -> None:
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    for resized in ((91, 140), (20, 31), (1, 1), (37, 60), (300, 7)):
        size = (min(resized[0], 16), min(resized[1], 16))
        last = (
            resized[0] - size[0],
            resized[1] - size[1],
        )  # in large images outside torch's resized part
        for offset in ((0, 0), last, (0, last[1]), (last[0] // 2, last[1] // 3)):
            geometry = Geometry((37, 53), resized, offset, size, flip, flip_y)
            canvas = transform_image(image, geometry, (16, 16), exact=False)[: size[0], : size[1]]
            assert np.abs(canvas.astype(int) - by_pillow(image, geometry)).max() <= 2


@pytest.mark.parametrize("flips_xy", [(False, False), (True, False), (False, True), (True, True)])
def test_a_read_only_image(recwarn: pytest.WarningsRecorder, flips_xy: tuple[bool, bool]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    geometry = Geometry((20, 30), (40, 60), (0, 0), (40, 60), *flips_xy)
    want = transform_image(image, geometry, (40, 60), exact=False)
    image.flags.writeable = False
    assert (transform_image(image, geometry, (40, 60), exact=False) == want).all()
    assert not [w for w in recwarn if "not writable" in str(w.message)]


def test_jpegs_equal_pillow(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((shared / "data/coco_panoptic200/images").glob("*.jpg"))
    grey = [path for path in files if Image.open(path).mode == "L"]
    picture = Image.open(files[0])
    for name, options in {"progressive": {"progressive": True}, "444": {"subsampling": 0}}.items():
        picture.save(tmp_path / f"{name}.jpg", quality=90, **options)
    decoded: list[bool] = []

    def spy(path: Path, header: Image.Image) -> NDArray[np.uint8] | None:
        found = decode(path, header)
        decoded.append(found is not None)
        return found

    decode = images._decode_jpeg
    monkeypatch.setattr(images, "_decode_jpeg", spy)
    for path in [*files[:12], *grey, *tmp_path.glob("*.jpg")]:
        with Image.open(path) as file:
            want = np.asarray(file.convert("RGB"))
        got = read_image(path, want.shape[:2])
        assert (got == want).all() and got.flags.c_contiguous and got.flags.writeable
    assert grey and all(decoded) and len(decoded) == 14 + len(grey)


def test_broken_jpegs_are_read_or_refused_as_by_pillow(shared: Path, tmp_path: Path) -> None:
    content = (shared / "data/coco_panoptic200/images/000000000009.jpg").read_bytes()
    rng = np.random.default_rng(0)
    versions = [
        content[: len(content) // 2],
        content[:-1],
        content[:-300],
        content + b"more",
        content[:-2] + b"\0",
    ]
    for _ in range(12):
        changed = bytearray(content)
        for at in rng.integers(700, len(content), 3):
            changed[at] = rng.integers(256)
        versions.append(bytes(changed))
    read = 0
    for version in versions:
        path = tmp_path / "image.jpg"
        path.write_bytes(version)
        size = (480, 640)
        try:
            want = np.asarray(Image.open(io.BytesIO(version)).convert("RGB"))
        except OSError as error:
            with pytest.raises(DataError) as refused:
                read_image(path, size)
            assert str(refused.value) == f"{path}: {error}"
            continue
        read += 1
        assert (read_image(path, size) == want).all()
    assert 0 < read < len(versions)


def test_images_of_a_batch_are_channels_last(demo_data: Path) -> None:
    """Models compute in this layout; another one would be copied on the GPU."""
    dataset = CocoDataset(demo_data / "train.json", demo_data / "train")
    batch = next(train_loader(dataset, DataConfig(size=(64, 96), short_side=64, workers=0), 2))
    assert batch.images_B3HW.is_contiguous(memory_format=torch.channels_last)
