"""Sliding windows and crops against mmsegmentation's rules in plain Python, and the stream of windows.

The rules are `slide_inference` of its EncoderDecoder, and RandomResize and RandomCrop of its transforms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from tiny import MODELS

from giantdet.architectures import build_model
from giantdet.config.architectures.common import NormConfig
from giantdet.config.architectures.semantic_fpn import SemanticFpnConfig
from giantdet.config.datasets import SemanticPngDatasetConfig
from giantdet.config.types import AugmentConfig, DataConfig
from giantdet.data.samples import make_sample
from giantdet.data.semantic_png import SemanticPngDataset
from giantdet.data.streams import EvalStream, TrainStream
from giantdet.data.transforms import Geometry, draw_balanced_crop, draw_crop, draw_geometry, windows
from giantdet.engine.predict import Predictor, image_batch, image_batches
from giantdet.evaluation.semantic import SemanticMaps
from giantdet.export import ExportConfig
from giantdet.structures import IGNORE

Slide = list[tuple[int, int, int, int]]


def slide(height: int, width: int, crop: tuple[int, int], stride: int) -> Slide:
    """Return (top, bottom, left, right) of mmsegmentation's windows over an image."""
    found = []
    rows = max(height - crop[0] + stride - 1, 0) // stride + 1
    columns = max(width - crop[1] + stride - 1, 0) // stride + 1
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride + crop[0], height), min(column * stride + crop[1], width)
            found.append((max(bottom - crop[0], 0), bottom, max(right - crop[1], 0), right))
    return found


@pytest.mark.parametrize("canvas", [(64, 64), (32, 96)])
def test_positions(canvas: tuple[int, int]) -> None:
    """Images range from smaller than the canvas to several times as large."""
    rng, counts = np.random.default_rng(0), set()
    for _ in range(300):
        height, width = (int(side) for side in rng.integers(20, 200, 2))
        short, stride = int(rng.integers(20, 120)), int(rng.integers(5, 70))
        found = windows((height, width), DataConfig(size=canvas, short_side=short), stride)
        scale = short / min(height, width)
        resized = (int(height * scale + 0.5), int(width * scale + 0.5))
        assert all(view.resized_hw == resized and not view.flip for view in found)
        boxes = [(y, y + h, x, x + w) for (y, x), (h, w) in ((v.offset_yx, v.size_hw) for v in found)]
        assert boxes == slide(*resized, canvas, stride)
        seen = np.zeros(resized, int)
        for top, bottom, left, right in boxes:
            seen[top:bottom, left:right] += 1
        assert seen.min() >= 1 or stride > min(canvas)
        counts.add(len(found))
    assert 1 in counts and max(counts) > 50


@pytest.mark.parametrize(
    ("image_hw", "stride"), [((80, 144), 40), ((64, 64), 16), ((40, 150), 33), ((66, 100), 64)]
)
@torch.no_grad()
def test_averaged_logits(image_hw: tuple[int, int], stride: int) -> None:
    """The predictor on an unscaled image, which may be smaller than the window."""
    size = (64, 64)
    section = SemanticFpnConfig.model_validate({**MODELS["semantic_fpn"], "num_classes": 5})
    torch.manual_seed(1)
    model = build_model(section, size, NormConfig(type="frozen")).eval()
    categories = tuple((n, str(n)) for n in range(5))
    short = min(image_hw)
    config = ExportConfig(
        model=section,
        size=size,
        short_side=short,
        window_stride=stride,
        categories=(),
        semantic_categories=categories,
    )
    pixels = np.random.default_rng(2).integers(0, 256, (*image_hw, 3), dtype=np.uint8)
    pixels[:, : image_hw[1] // 2] //= 4
    total, times = torch.zeros(1, 5, *image_hw), torch.zeros(image_hw)
    for top, bottom, left, right in slide(*image_hw, size, stride):
        crop = np.zeros((*size, 3), np.uint8)
        crop[: bottom - top, : right - left] = pixels[top:bottom, left:right]
        batch = image_batch(crop, DataConfig(size=size, short_side=64))
        batch = batch._replace(sizes_B2=torch.tensor([[float(bottom - top), float(right - left)]]))
        logits = model(batch).semantic_BCHW
        whole = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        total[:, :, top:bottom, left:right] += whole[:, :, : bottom - top, : right - left]
        times[top:bottom, left:right] += 1
    expected = (total / times)[0].argmax(0)
    found = Predictor(model, config)(pixels)
    assert found.semantic_HW is not None and found.semantic_HW.shape == image_hw
    assert (found.semantic_HW != expected).float().mean() < 1e-3  # ties
    assert len(expected.unique()) > 1, "one class everywhere: the test is vacuous"


def test_averages_are_resized_to_the_image() -> None:
    """Random logits of partly padded windows; each pixel is covered once to three times."""
    generator = torch.Generator().manual_seed(0)
    config, image_hw, resized = DataConfig(size=(64, 32), short_side=48), (30, 71), (48, 114)
    batches = list(image_batches(np.zeros((*image_hw, 3), np.uint8), config, 20))
    total, times, maps = torch.zeros(1, 4, *resized), torch.zeros(resized), SemanticMaps()
    boxes = slide(*resized, (64, 32), 20)
    assert len(boxes) == len(batches) == 6
    for (top, bottom, left, right), batch in zip(boxes, batches, strict=True):
        logits = torch.randn(1, 4, 16, 8, generator=generator)
        whole = F.interpolate(logits, (64, 32), mode="bilinear", align_corners=False)
        total[:, :, top:bottom, left:right] += whole[:, :, : bottom - top, : right - left]
        times[top:bottom, left:right] += 1
        found = list(maps.add(logits, batch))
        assert len(found) == (batch is batches[-1])
    assert set(times.unique().tolist()) == {1, 2, 3}
    expected = F.interpolate(total / times, image_hw, mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(found[0][1], expected)
    summed = F.interpolate(total, image_hw, mode="bilinear", align_corners=False)[0].argmax(0)
    assert (summed != expected).sum() > 5, "the sum would pass as well: the average is not tested"


# Random scale and crop in training


def test_random_scale_and_crop() -> None:
    """RandomResize by a factor of the short side, then a crop anywhere, at most as large as the canvas."""
    config = DataConfig(size=(64, 96), short_side=80, augment=AugmentConfig(scale=(0.5, 2.0)))
    rng, image_hw = np.random.default_rng(0), (50, 70)
    scales, places, flips = [], [], []
    for _ in range(2000):
        geometry = draw_geometry(rng, image_hw, config, training=True)
        (height, width), (h, w), (top, left) = geometry.resized_hw, geometry.size_hw, geometry.offset_yx
        assert (h, w) == (min(height, 64), min(width, 96))
        assert 0 <= top <= height - h and 0 <= left <= width - w
        assert width == pytest.approx(height * 70 / 50, abs=1.3), "both sides have the same factor"
        scales.append(height / 80)
        if height > 100:
            places.append((top / (height - h), left / (width - w)))
        flips.append(geometry.flip)
    # Uniform: ends, mean and quartiles of the factor, and of the position.
    assert min(scales) == pytest.approx(0.5, abs=0.02) and max(scales) == pytest.approx(2.0, abs=0.02)
    assert np.quantile(scales, [0.25, 0.5, 0.75]) == pytest.approx([0.875, 1.25, 1.625], abs=0.06)
    for axis in np.array(places).T:
        assert axis.min() == 0 and axis.max() == 1
        assert np.quantile(axis, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.06)
    assert np.mean(flips) == pytest.approx(0.5, abs=0.05)
    evaluated = draw_geometry(rng, image_hw, config, training=False)
    assert evaluated.offset_yx == (0, 0) and evaluated.resized_hw == evaluated.size_hw == (64, 90)


def balanced(crop: NDArray[np.uint8], share: float) -> bool:
    """mmsegmentation's criterion for a crop."""
    labels, counts = np.unique(crop, return_counts=True)
    counts = counts[labels != IGNORE]
    return len(counts) > 1 and counts.max() / counts.sum() < share


def class_map() -> NDArray[np.uint8]:
    """A map of mostly one class, with others in a corner and an unlabelled part."""
    labels = np.zeros((40, 60), np.uint8)
    labels[25:, 40:] = 1
    labels[30:, 50:] = 2
    labels[:10, :30] = IGNORE
    return labels


@pytest.mark.parametrize("flip", [False, True])
def test_balanced_crops_draw_by_draw(flip: bool) -> None:
    """The crops equal those of a loop over slices of the map."""
    labels, crop, share = class_map(), (16, 20), 0.75
    shown = labels[:, ::-1] if flip else labels
    tried = []
    for seed in range(200):
        rng, twin = np.random.default_rng(seed), np.random.default_rng(seed)
        start = draw_crop(rng, Geometry((40, 60), (40, 60), (0, 0), crop, flip))
        found = draw_balanced_crop(rng, start, labels, share)
        draws, good = 0, False
        while not good and draws < 11:
            top, left = int(twin.integers(40 - 16 + 1)), int(twin.integers(60 - 20 + 1))
            draws, good = draws + 1, balanced(shown[top : top + 16, left : left + 20], share)
        assert found.offset_yx == (top, left) and found._replace(offset_yx=(0, 0)) == start._replace(
            offset_yx=(0, 0)
        )
        tried.append(draws)
    assert {1, 11} <= set(tried), "some crops are accepted at once, some never"


def test_share_of_balanced_crops() -> None:
    """11 draws, each good with probability p: a share 1 - (1 - p)^11 of the samples is good."""
    labels, crop, share = class_map(), (16, 20), 0.6
    places = [(y, x) for y in range(25) for x in range(41)]
    p = np.mean([balanced(labels[y : y + 16, x : x + 20], share) for y, x in places])
    rng, good, count = np.random.default_rng(3), 0, 1000
    for _ in range(count):
        start = draw_crop(rng, Geometry((40, 60), (40, 60), (0, 0), crop, False))
        y, x = draw_balanced_crop(rng, start, labels, share).offset_yx
        good += balanced(labels[y : y + 16, x : x + 20], share)
    expected = 1 - (1 - p) ** 11
    assert 0.02 < p < 0.2
    assert good / count == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / count))


def pictured(folder: Path, maps: list[NDArray[np.uint8]]) -> SemanticPngDataset:
    """A data set whose images show 80 times the class in every channel, 240 where unlabelled."""
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for n, labels in enumerate(maps):
        grey = np.where(labels == IGNORE, 240, labels * 80).astype(np.uint8)
        Image.fromarray(np.stack([grey] * 3, -1)).save(folder / f"images/{n}.png")
        Image.fromarray(labels).save(folder / f"labels/{n}.png")
    paths = {"images": str(folder / "images"), "labels": str(folder / "labels")}
    return SemanticPngDataset(
        SemanticPngDatasetConfig(format="semantic_png", classes=("a", "b", "c"), **paths)
    )


def test_image_and_map_are_cropped_equally(tmp_path: Path) -> None:
    """They agree even if the crop is drawn again; `crop_class_share` changes only the crop."""
    dataset = pictured(tmp_path, [class_map()])
    scale = AugmentConfig(scale=(1.0, 1.0))
    plain = DataConfig(size=(32, 32), short_side=40, augment=scale)
    chosen = plain.model_copy(update={"augment": scale.model_copy(update={"crop_class_share": 0.6})})
    changed = 0
    for k in range(40):
        samples = [TrainStream(dataset, config, 7, frozenset({"semantic"}))[k] for config in (plain, chosen)]
        for sample in samples:
            labels = sample.semantic_HW
            shown = np.where(labels == IGNORE, 240, labels * 80)
            assert labels.shape == (32, 32) and (sample.image_hw3 == shown[..., None]).all()
        if balanced(samples[0].semantic_HW, 0.6):
            assert (samples[0].semantic_HW == samples[1].semantic_HW).all()
        else:
            changed += not np.array_equal(samples[0].semantic_HW, samples[1].semantic_HW)
    assert changed > 10


# The stream of windows over the ranks


class Sizes:
    """The part of a data set's interface that the stream uses."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.sizes_hw, self.annotations = np.array(sizes), "sizes"

    def __len__(self) -> int:
        return len(self.sizes_hw)


@pytest.mark.parametrize("stride", [None, 20])
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_view_once(world: int, batch: int, stride: int | None) -> None:
    rng = np.random.default_rng(world)
    dataset: Any = Sizes([(int(h), int(w)) for h, w in rng.integers(30, 120, (7, 2))])
    stream = EvalStream(dataset, DataConfig(size=(32, 32), short_side=40), frozenset(), stride)
    config = DataConfig(size=(32, 32), short_side=40)
    views = [
        1 if stride is None else len(windows((int(h), int(w)), config, stride)) for h, w in dataset.sizes_hw
    ]
    image_of = np.repeat(np.arange(7), views)
    ranks = [stream.batches(batch, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1, "every rank takes the same number of steps"
    assert all(len(numbers) == batch for batches in ranks for numbers in batches)
    real = [[k for numbers in batches for k in numbers if k < sum(views)] for batches in ranks]
    assert sorted(k for numbers in real for k in numbers) == list(range(sum(views)))
    assert all(numbers == sorted(numbers) for numbers in real)
    if stride is not None:
        owners = [set(image_of[numbers].tolist()) for numbers in real]
        assert sum(map(len, owners)) == 7, "each image is on one rank"
        assert max(views) > 5


def test_views_match_their_description(tmp_path: Path) -> None:
    """Pixels, position and number of each window; padding views and unreadable images have the id -1."""
    maps = [class_map(), np.zeros((33, 40), np.uint8)]
    dataset = pictured(tmp_path, maps)
    config = DataConfig(size=(32, 32), short_side=33)
    stream = EvalStream(dataset, config, frozenset({"semantic"}), 16)
    count = int(stream.first[1])
    for k in range(count):
        sample, views = stream[k], windows((40, 60), config, 16)
        expected = make_sample(dataset, 0, k, config, views[k], frozenset({"semantic"}))
        assert (sample.image_hw3 == expected.image_hw3).all() and sample.image_id == 0
        assert sample.window == (*views[k].offset_yx, 33, 50, k, count)
    second = stream[count]
    assert second.image_id == 1 and second.window[2:] == (33, 40, 0, int(stream.first[2]) - count)
    (tmp_path / "images/1.png").write_bytes(b"")
    for k in (count, int(stream.first[2]), 10_000):
        nothing = stream[k]
        assert nothing.image_id == -1 and nothing.window == (0, 0, 32, 32, 0, 1)
        assert not nothing.image_hw3.any() and (nothing.semantic_HW == IGNORE).all()
    assert stream[count].counts == {"unreadable_images": 1} and "1.png" in stream[count].bad[0]
