"""Pictures of results: smooth masks where the masks are, labels that can be read, colours, maps, legends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from giantdet.config.classes import Classes
from giantdet.data.coco import CocoDataset
from giantdet.data.coco_panoptic import CocoPanopticDataset
from giantdet.data.panoptic import PanopticMap, Segment
from giantdet.engine import fonts, labels, outlines
from giantdet.engine.colors import color_of, is_light, muted_color_of
from giantdet.engine.draw import compare, draw
from giantdet.engine.found import Found, truth_of
from giantdet.engine.labels import Label, plates_of, text_size
from giantdet.engine.outlines import Shape, paint, rectangle
from giantdet.evaluation.rle import encode_window


def found_of(names: list[str], boxes: list[list[float]], masks: list[NDArray[Any]] | None = None) -> Found:
    known = list(dict.fromkeys(names))
    return Found(
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.full((len(names),), 0.9),
        torch.tensor([known.index(name) for name in names], dtype=torch.int64),
        names,
        [known.index(name) for name in names],
        None if masks is None else [encode_window(mask, (0, 0), mask.shape) for mask in masks],
    )


def disc(side: int, radius: float, hole: float = 0.0) -> NDArray[np.bool_]:
    y, x = np.mgrid[:side, :side] + 0.5 - side / 2
    return (x**2 + y**2 < radius**2) & (x**2 + y**2 >= hole**2)


@pytest.mark.parametrize("zoom", [1, 4])
def test_a_mask_is_painted_where_it_is_with_smooth_edges(zoom: int) -> None:
    mask, side = disc(100, 30, hole=10), 100 * zoom
    rings = outlines.outlines(mask[10:90, 15:85], (15, 10), zoom)
    picture = Image.new("RGB", (side, side))
    paint(picture, [Shape(rings, fill=((255, 255, 255), 1.0))])
    white = np.asarray(picture)[..., 0] / 255
    exact = disc(side, 30 * zoom, hole=10 * zoom)  # the disc itself, not the steps of its mask
    assert abs(white.sum() - exact.sum()) < 0.01 * exact.sum()
    assert np.abs(white - exact).sum() < 0.035 * exact.sum()
    edges = ((white > 0.02) & (white < 0.98)).sum()
    assert 0.7 < edges / (2 * np.pi * 40 * zoom) < 2, "about as many grey pixels as the borders are long"


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2)])
def test_masks_of_a_few_pixels_are_seen(size: tuple[int, int]) -> None:
    (ring,) = outlines.outlines(np.ones(size, bool), (10, 20), 1)
    height, width = size
    low, high = ring.min(0), ring.max(0)
    assert (low >= (9.4, 19.4)).all() and (high <= (10.6 + width, 20.6 + height)).all()
    assert (high - low > 0.4).all()
    assert outlines.outlines(np.zeros(size, bool), (0, 0), 1) == []


def test_large_masks_are_reduced_and_stay_in_place() -> None:
    mask = np.zeros((3000, 2500), np.uint8)
    mask[100:2900, 200:2300] = 1
    (ring,) = outlines.outlines(mask, (0, 0), 1)
    assert np.abs([*ring.min(0), *ring.max(0)] - np.array([200, 100, 2300, 2900])).max() < 2
    assert len(ring) < 7000


def test_tiles_make_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 255, (300, 520, 3), dtype=np.uint8)
    mask = np.zeros((300, 520), bool)
    mask[40:140, 60:160] = disc(100, 45)
    found = found_of(["a", "b"], [[60, 40, 160, 140], [200, 100, 500, 290]], [mask, mask[:, ::-1]])
    whole = np.asarray(draw(image, found))
    monkeypatch.setattr(outlines, "_TILE", 64)
    assert np.abs(np.asarray(draw(image, found)).astype(int) - whole).max() <= 1
    assert (whole != image).any()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (480, 640), (1080, 1920)])
def test_labels_grow_with_the_picture_and_stay_inside(height: int, width: int) -> None:
    """A box in the lower right corner: its label is moved inside, as a whole."""
    image = np.zeros((height, width, 3), np.uint8)
    name = "перекрёсток"
    found = found_of([name], [[width - 9.0, height - 9.0, width - 1.0, height - 1.0]])
    picture = draw(image, found)
    (plate,) = plates_of(
        picture.size, text_size(picture), [Label(name, "0.90", (9, 9, 9), (width - 9.0,) * 4)]
    )
    assert plate.text.text == f"{name} 0.90", "Cyrillic is in the font"
    pixels = np.asarray(picture)
    ground = (np.abs(pixels.astype(int) - color_of(0)) < 24).all(-1)  # plates are a little transparent
    rows, columns = np.nonzero(ground)
    assert columns.max() < picture.width and columns.min() <= picture.width - plate.text.box[2]
    assert (pixels > 240).all(-1).sum() > 20, "white letters"
    assert rows.max() - rows.min() >= min(picture.size) / 42


def test_labels_neither_leave_the_picture_nor_cover_each_other() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 1, (12, 2)) * (700, 500)
    boxes = np.concatenate([corners, np.minimum(corners + rng.uniform(5, 200, (12, 2)), (800, 600))], 1)
    placed = plates_of((800, 600), 14, [Label("stop sign", "0.90", (0, 0, 0), tuple(box)) for box in boxes])
    assert len(placed) >= 11
    cover = np.zeros((600, 800), int)
    for (x0, y0, x1, y1), _, text in placed:
        assert x0 >= 0 and y0 >= 0 and x1 <= 800 and y1 <= 600
        assert x1 - x0 >= text.box[2] and y1 - y0 >= 14
        cover[int(y0) : int(y1), int(x0) : int(x1)] += 1
    assert (cover > 1).sum() <= labels._COVERED * (cover > 0).sum()


def test_a_label_does_not_hide_its_small_object() -> None:
    box = (300.0, 200.0, 312.0, 212.0)
    for corner in ((0, 0), (0, 588), (788, 0), (788, 588), (300, 200)):
        box = (corner[0], corner[1], corner[0] + 12, corner[1] + 12)
        (plate,) = plates_of((800, 600), 14, [Label("cat", "0.90", (0, 0, 0), box)])
        x0, y0, x1, y1 = plate.box
        assert x1 <= box[0] or x0 >= box[2] or y1 <= box[1] or y0 >= box[3], corner


def test_instances_of_a_class_differ_and_labels_of_narrow_pictures_are_cut(monkeypatch: Any) -> None:
    texts: list[str] = []
    monkeypatch.setattr(labels, "written", lambda text, size: texts.append(text) or fonts.written(text, size))
    boxes = [[1.0, 100, 9, 120], [11.0, 100, 19, 120], [21.0, 100, 29, 120]]
    found = found_of(["traffic light"] * 3, boxes)
    picture = np.asarray(draw(np.zeros((600, 60, 3), np.uint8), found))
    colors = {tuple(picture[110, x]) for x in (1, 11, 21)}
    assert len(colors) == 3 and (0, 0, 0) not in colors
    assert fonts.written(texts[-1], 13).box[2] <= 60 and texts[-1].endswith(".. 0.90")


def test_crowds_have_a_legend_instead_of_labels(monkeypatch: Any) -> None:
    """Of few objects the labels are written; of many the legend counts them."""
    texts: list[str] = []
    monkeypatch.setattr(labels, "written", lambda text, size: texts.append(text) or fonts.written(text, size))
    image = np.zeros((520, 520, 3), np.uint8)
    boxes = [[x * 20.0, y * 20.0, x * 20 + 15.0, y * 20 + 15.0] for x in range(15) for y in range(16)]
    picture = draw(image, found_of(["cell"] * 200 + ["nucleus"] * 40, boxes))
    assert texts[-2:] == ["cell ×200", "nucleus ×40"]
    assert picture.width == 520 and 520 < picture.height < 600
    assert (np.asarray(picture)[520:] == color_of(0)).all(-1).sum() > 80
    assert draw(image, found_of(["cell"], [[100, 100, 300, 300]])).size == (520, 520)


def test_a_legend_longer_than_the_picture_says_how_many_are_missing(monkeypatch: Any) -> None:
    texts: list[str] = []
    monkeypatch.setattr(labels, "written", lambda text, size: texts.append(text) or fonts.written(text, size))
    rows = [labels.Row(f"class number {n}", color_of(n)) for n in range(90)]
    picture = labels.with_legend(Image.new("RGB", (520, 200)), rows)
    assert picture.height < 320
    shown = [text for text in dict.fromkeys(texts) if text.startswith("class")]
    rest = int(texts[-1].split()[1])
    assert texts[-1] == f"and {rest} more" and rest + len(shown) - 2 == 90


def _luminance(color: tuple[int, ...]) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.array(color) / 255]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_letters_have_contrast_on_every_colour() -> None:
    """WCAG 2.1 asks for 3 : 1 for large letters."""
    colors = [color_of(n, shade) for n in range(300) for shade in range(5)]
    colors += [muted_color_of(n) for n in range(300)]
    for color in colors:
        ink = labels._INK if is_light(color) else (255, 255, 255)
        low, high = sorted((_luminance(color), _luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 3, color


def test_colours_of_classes_differ() -> None:
    colors = np.array([color_of(n) for n in range(20)], float)
    distance = np.linalg.norm(colors[:, None] - colors, axis=-1) + 999 * np.eye(20)
    assert distance.min() > 25 and distance[:8, :8].min() > 55
    for n in range(20):
        assert len({color_of(n, shade) for shade in range(5)}) == 5


def test_maps_are_painted_named_and_counted(monkeypatch: Any) -> None:
    texts: list[str] = []
    monkeypatch.setattr(labels, "written", lambda text, size: texts.append(text) or fonts.written(text, size))
    ids_HW = np.zeros((600, 800), np.int32)
    ids_HW[:300], ids_HW[400:500, 100:200], ids_HW[400:500, 400:500] = 9, 5, 6
    classes = Classes(objects=((3, "dining table"),), semantic=((0, "things"), (17, "sky")))
    panoptic = PanopticMap(ids_HW, [Segment(5, 3), Segment(6, 3), Segment(9, 17)])
    found = Found(
        *(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), [], []), panoptic=panoptic, classes=classes
    )
    image = np.full((600, 800, 3), 100, np.uint8)
    picture = np.asarray(draw(image, found))
    assert texts[-2:] == ["sky", "dining table ×2"], "the largest first"
    assert texts.count("dining table") == 2 and texts.count("sky") == 2, "each segment, and the legend"
    for (y, x), color in {
        (20, 20): muted_color_of(1),
        (410, 110): color_of(0),
        (410, 410): color_of(0, 1),
    }.items():
        expected = 0.45 * 100 + 0.55 * np.array(color)
        assert np.abs(picture[y, x] - expected).max() <= 2
    assert (picture[560, 20] == 100).all(), "void is left as it is"
    semantic = found._replace(panoptic=None, semantic_HW=torch.from_numpy(ids_HW.astype(np.int64) // 9))
    picture = np.asarray(draw(image, semantic))
    assert np.abs(picture[20, 20] - (45 + 0.55 * np.array(color_of(1)))).max() <= 2
    assert np.abs(picture[560, 20] - (45 + 0.55 * np.array(color_of(0)))).max() <= 2


def test_truth_beside_prediction(demo_data: Path, monkeypatch: Any) -> None:
    texts: list[str] = []
    monkeypatch.setattr(labels, "written", lambda text, size: texts.append(text) or fonts.written(text, size))
    dataset = CocoDataset(demo_data / "val.json", demo_data / "val")
    i = int(np.argmax([len(dataset.objects(i)) for i in range(len(dataset))]))
    truth, image = truth_of(dataset, i), dataset.read_image(i)
    assert truth.masks_DHW is not None and len(truth.names) > 1
    assert (truth.masks_DHW.numpy() == dataset.objects(i).masks()).all()
    picture = compare(image, truth, truth._replace(scores_D=torch.full((len(truth.names),), 0.75)))
    alone = draw(image, truth)
    assert picture.width > 2 * alone.width and picture.height > alone.height
    assert "Ground truth" in texts and "Prediction" in texts
    for name in set(truth.names):
        assert name in texts and f"{name} 0.75" in texts


def test_truth_of_maps(demo_data: Path) -> None:
    dataset = CocoPanopticDataset(
        demo_data / "panoptic_val.json", demo_data / "val", demo_data / "panoptic_val"
    )
    truth = truth_of(dataset, 0)
    expected = dataset.panoptic_map(0)
    assert truth.panoptic is not None and (truth.panoptic.ids_HW == expected.ids_HW).all()
    assert truth.semantic_HW is not None and truth.semantic_HW.shape == expected.ids_HW.shape
    assert draw(dataset.read_image(0), truth).width == 512


def test_a_rectangle_is_closed_and_inside_its_box() -> None:
    for radius in (0.0, 3.0, 99.0):
        ring = rectangle((10, 20, 50, 40), radius)
        assert (ring[0] == ring[-1]).all()
        assert np.allclose(ring.min(0), (10, 20)) and np.allclose(ring.max(0), (50, 40))
