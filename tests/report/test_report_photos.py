"""Pictures of objects: the targets of training samples, and large images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_run

from giantdet.config.classes import Classes
from giantdet.config.load import parse_run
from giantdet.data.dataset import open_dataset
from giantdet.data.streams import EvalStream
from giantdet.evaluation.rle import decode_mask
from giantdet.report import photos
from giantdet.report.photos import Photo, drawn, map_found, objects_found, sample_found

CLASSES = Classes(objects=((1, "disc"),), semantic=((0, "ground"), (1, "disc")))


def test_targets_are_the_masks_of_the_objects(demo_data: Path, tmp_path: Path) -> None:
    """At the size of the file, where a cell of a target's bitmap is a pixel."""
    config = parse_run(tiny_run(demo_data, tmp_path)).giantdet
    assert config.data.val is not None
    dataset = open_dataset(config.data.val)
    data = config.data.model_copy(update={"mask_frame": 112})
    stream = EvalStream(dataset, data, frozenset({"boxes", "masks"}))
    compared = 0
    for i in range(len(dataset)):
        sample, objects = stream[i], dataset.objects(i)
        found = sample_found(sample, dataset.classes)
        if len(sample.labels_N) < len(objects):  # more than max_objects
            continue
        for n in range(len(objects)):
            assert torch.equal(found.mask(n), decode_mask(objects.rle(n)))
            assert found.names[n] == dataset.classes.objects[int(objects.labels_N[n])][1]
            compared += 1
    assert compared > 5


def test_a_semantic_sample_is_its_map(demo_data: Path, tmp_path: Path) -> None:
    config = parse_run(tiny_run(demo_data, tmp_path, "semantic_fpn")).giantdet
    assert config.data.val is not None
    dataset = open_dataset(config.data.val)
    found = sample_found(EvalStream(dataset, config.data, frozenset({"semantic"}))[0], dataset.classes)
    assert found.semantic_HW is not None
    assert (found.semantic_HW.numpy() == dataset.semantic_map(0)).all()


@pytest.mark.parametrize("limit", [50_000_000, 1000])
def test_large_images_are_drawn_small(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disc of radius 300 in 3000 x 2000 pixels has one of 120 in 1200 x 800; or just a box."""
    monkeypatch.setattr(photos, "_MASK_PIXELS", limit)
    rows, columns = np.ogrid[:2000, :3000]
    disc_HW = ((columns - 1500) ** 2 + (rows - 1000) ** 2 < 300**2).astype(np.uint8)
    image = np.zeros((2000, 3000, 3), np.uint8)
    box, one = np.array([[1200.0, 700.0, 600.0, 600.0]]), np.array([0])
    whole = objects_found(box, one, np.ones(1), [photos._encoded(disc_HW)], CLASSES, (2000, 3000))
    small, found = photos._shrunk(image, whole)
    assert small.shape == (800, 1200, 3) and found.size_hw == (800, 1200)
    assert found.boxes_D4.tolist() == [[480, 280, 720, 520]]
    if limit == 1000:
        assert found.rles_D is None
    else:
        assert int(found.mask(0).sum()) == pytest.approx(np.pi * 120**2, rel=0.01)
    _, mapped = photos._shrunk(image, map_found(disc_HW, CLASSES))
    assert mapped.semantic_HW is not None
    assert int(mapped.semantic_HW.sum()) == pytest.approx(np.pi * 120**2, rel=0.01)
    assert max(Photo.of(drawn(image, whole)).size) <= 600
