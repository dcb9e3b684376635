"""A generated data set with instance, panoptic and semantic annotations: shapes on a textured ground.

It tests the whole system without a download. Circles, rectangles, triangles and stars of any colour, slightly
rotated, 18 to 40 % of the image's side, overlap; some images contain crowds of small ones (14 to 18 %), one
in twenty is empty. The ground is stuff of two classes, dark and light; parts of shapes too small to count
are void.
"""

from __future__ import annotations

import functools
import json
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_util

from giantdet.data.panoptic import panoptic_png
from giantdet.structures import IGNORE

# Ids with gaps, as COCO's have.
CATEGORIES = {1: "circle", 3: "rectangle", 4: "triangle", 7: "star"}
STUFF = {92: "dark ground", 95: "light ground"}
_EMPTY, _CROWDED = 0.05, 0.2  # fractions of the images
_MIN_VISIBLE, _MIN_PIXELS = 0.3, 16
_TURN = 0.25  # radians, either way
MANY = 200  # images that are worth several processes


def make_demo(folder: str | Path, train_images: int, val_images: int, size: int = 128, seed: int = 0) -> None:
    """Write train.json, val.json, train/ and val/ into `folder`: COCO format, square images of `size` pixels.

    Beside them are panoptic_train.json and panoptic_train/ in COCO's panoptic format, and semantic_train/,
    PNG files of labels whose names are in semantic_classes.json; the same for val. Image n of a split depends
    only on (seed, split, n). Masks contain visible pixels only: later shapes cover earlier ones. Unoccluded
    shapes are polygons, the others compressed RLE.
    """
    folder, names = Path(folder), CATEGORIES | STUFF
    with ProcessPoolExecutor() if train_images + val_images >= MANY else nullcontext() as pool:
        in_order = map if pool is None else functools.partial(pool.map, chunksize=MANY // 20)
        for split, (name, count) in enumerate((("train", train_images), ("val", val_images))):
            for directory in (name, f"panoptic_{name}", f"semantic_{name}"):
                (folder / directory).mkdir(parents=True, exist_ok=True)
            made = list(
                in_order(functools.partial(_make_image, folder, name, split, size, seed), range(count))
            )
            images = [image for image, _, _ in made]
            owned = [(image["id"], fields) for image, objects, _ in made for fields in objects]
            annotations = [
                {"id": number, "image_id": image_id, "iscrowd": 0, **fields}
                for number, (image_id, fields) in enumerate(owned, 1)
            ]
            categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
            content = {"images": images, "annotations": annotations, "categories": categories}
            (folder / f"{name}.json").write_text(json.dumps(content))
            panoptic = [
                {"image_id": image["id"], "file_name": f"{n:06d}.png", "segments_info": segments}
                for n, (image, _, segments) in enumerate(made)
            ]
            classes = [{"id": i, "name": names[i], "isthing": int(i in CATEGORIES)} for i in names]
            content = {"images": images, "annotations": panoptic, "categories": classes}
            (folder / f"panoptic_{name}.json").write_text(json.dumps(content))
    (folder / "semantic_classes.json").write_text(json.dumps(list(names.values())))


def _make_image(
    folder: Path, name: str, split: int, size: int, seed: int, n: int
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Write the files of image n of a split; return its entry, its objects' and its segments'."""
    pixels, objects, segments_HW, ground = _draw(np.random.default_rng((seed, split, n)), size)
    file_name, png = f"{n:06d}.{'png' if n % 2 else 'jpg'}", f"{n:06d}.png"
    Image.fromarray(pixels).save(folder / name / file_name, quality=92)
    (folder / f"panoptic_{name}" / png).write_bytes(panoptic_png(segments_HW))
    owners = [*(fields["category_id"] for fields in objects), ground]
    kinds = [*CATEGORIES, *STUFF]
    labels = np.array([IGNORE, *(kinds.index(owner) for owner in owners)], np.uint8)
    Image.fromarray(labels[segments_HW]).save(folder / f"semantic_{name}" / png)
    segments = [_segment(segments_HW == number, number, owner) for number, owner in enumerate(owners, 1)]
    # ids start at 1 and differ between the splits, so that confusing them is noticed
    image = {"id": split * 10**6 + n + 1, "file_name": file_name, "height": size, "width": size}
    return image, objects, [segment for segment in segments if segment["area"]]


def _segment(mask_HW: NDArray[np.bool_], number: int, category: int) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    bbox = [int(v) for v in mask_util.toBbox(rle)]
    return {"id": number, "category_id": category, "area": int(mask_HW.sum()), "bbox": bbox, "iscrowd": 0}


def _draw(
    rng: np.random.Generator, size: int
) -> tuple[NDArray[np.uint8], list[dict[str, Any]], NDArray[np.int32], int]:
    """Return an image, the fields of its visible objects, its segments and the category of its ground.

    The segments are the number of the object of each pixel, from 1, one more for the ground, and 0 for void.
    """
    ground = _ground(rng, size)
    canvas = ground.copy()
    shapes: list[tuple[int, float, float, float]] = []  # category, centre x and y, radius
    kinds = list(CATEGORIES)
    if rng.random() >= _EMPTY:
        for _ in range(int(rng.integers(2, 9))):
            x, y = rng.uniform(0.08, 0.92, 2) * size
            shapes.append((int(rng.choice(kinds)), x, y, size * float(rng.uniform(0.09, 0.2))))
        if rng.random() < _CROWDED:
            centre, kind = rng.uniform(0.25, 0.75, 2) * size, int(rng.choice(kinds))
            for _ in range(int(rng.integers(6, 14))):
                x, y = np.clip(centre + rng.normal(0, 0.17 * size, 2), 0.03 * size, 0.97 * size)
                shapes.append((kind, x, y, size * float(rng.uniform(0.07, 0.09))))
    owner = np.full((size, size), -1)
    outlines, areas = [], []
    for n, (kind, x, y, radius) in enumerate(shapes):
        outline = _outline(rng, kind) * radius + (x, y)
        outlines.append(outline.round(2))
        # pycocotools fills the polygon, so that image and annotation agree in every pixel
        rle = mask_util.frPyObjects([outlines[-1].ravel()], size, size)[0]
        mask = mask_util.decode(rle).astype(bool)
        areas.append(int(mask.sum()))
        owner[mask] = n
        texture = rng.normal(0, rng.uniform(2, 8), (size, size, 1))
        canvas[mask] = (_colour(rng, ground[mask].mean(axis=0) if mask.any() else ground[0, 0]) + texture)[
            mask
        ]
    objects: list[dict[str, Any]] = []
    segments_HW = np.zeros((size, size), np.int32)
    for n, (kind, *_) in enumerate(shapes):
        visible = owner == n
        area = int(visible.sum())
        if area < max(_MIN_PIXELS, _MIN_VISIBLE * areas[n]):
            continue
        whole = area == areas[n] and outlines[n].min() >= 0 and outlines[n].max() <= size
        rle = mask_util.encode(np.asfortranarray(visible.astype(np.uint8)))
        bbox = [float(v) for v in mask_util.toBbox(rle)]
        segmentation: Any = [outlines[n].ravel().tolist()]
        if not whole:
            segmentation = {"size": [size, size], "counts": rle["counts"].decode()}
        segments_HW[visible] = len(objects) + 1
        objects.append({"category_id": kind, "bbox": bbox, "area": area, "segmentation": segmentation})
    pixels = canvas + rng.normal(0, 3, canvas.shape)
    segments_HW[owner == -1] = len(objects) + 1
    dark, light = STUFF
    kind = dark if ground.mean() < 128 else light
    return np.clip(pixels, 0, 255).astype(np.uint8), objects, segments_HW, kind


def _outline(rng: np.random.Generator, kind: int) -> NDArray[np.float64]:
    """Return the corners [n, 2] of a shape of radius about 1 around 0, slightly rotated at random."""
    if CATEGORIES[kind] == "circle":
        angle, radius = np.arange(24) / 24 * 2 * np.pi, np.ones(24)
    elif CATEGORIES[kind] == "rectangle":
        half = np.arctan(rng.uniform(0.5, 1.0))  # the ratio of the sides
        angle, radius = np.array([half, np.pi - half, np.pi + half, -half]), np.ones(4)
    elif CATEGORIES[kind] == "triangle":
        angle, radius = np.arange(3) / 3 * 2 * np.pi + rng.uniform(-0.2, 0.2, 3), np.ones(3)
    else:
        angle, radius = np.arange(10) / 10 * 2 * np.pi, np.tile([1.0, 0.5], 5)
    angle = angle + rng.uniform(-_TURN, _TURN) - np.pi / 2
    return np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=1)


def _colour(rng: np.random.Generator, ground: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a colour that differs from the background by at least 80 in RGB."""
    while True:
        colour = rng.uniform(20, 235, 3)
        if np.linalg.norm(colour - ground) > 80:
            return colour


def _ground(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Return a background of coloured blotches of two sizes under noise, [size, size, 3]."""
    ground = rng.uniform(40, 215, 3) + np.zeros((size, size, 3))
    for cells, strength in ((4, 18.0), (16, 8.0)):
        coarse = rng.normal(0, strength, (cells, cells, 3))
        layers = [Image.fromarray(coarse[..., c].astype(np.float32)) for c in range(3)]
        smooth = [np.asarray(layer.resize((size, size), Image.Resampling.BICUBIC)) for layer in layers]
        ground += np.stack(smooth, axis=-1)
    return ground + rng.normal(0, rng.uniform(1, 6), (size, size, 1))
