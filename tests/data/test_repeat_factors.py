"""Repeat factors against a brute force of their formula, and the sample order that follows from them."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from giantdet.config.checks import parse_giantdet
from giantdet.config.datasets import CocoDatasetConfig
from giantdet.config.types import DataConfig, SamplingConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.dataset import open_dataset
from giantdet.data.demo import make_demo
from giantdet.data.loader import train_loader
from giantdet.data.sampling import Repeats, class_factors, repeat_factors, sampling_text, weighted
from giantdet.data.streams import TrainStream, sample_index
from giantdet.errors import ConfigError

CONFIG = DataConfig(size=(64, 64), short_side=64, max_objects=8, mask_frame=28, workers=0)
RARE = SamplingConfig(type="repeat_factor", threshold=3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    make_demo(path, 22, 5, size=64)
    return path


def section(folder: Path, split: str, **more: Any) -> CocoDatasetConfig:
    return CocoDatasetConfig(annotations=str(folder / f"{split}.json"), images=str(folder / split), **more)


def test_class_factors_by_hand() -> None:
    """Class 0 is in 4 of 5 images, 1 in one, 2 in two, 3 in none; the threshold is 0.4."""
    labels = [[0, 0, 1], [0], [0, 2], [0, 2, 2], []]
    found = class_factors([np.array(of_image, np.int64) for of_image in labels], 0.4)
    assert found == pytest.approx([math.sqrt(2), 1.0, 1.0, 1.0, 1.0])
    found = class_factors([np.array(of_image, np.int64) for of_image in labels], 1.0)
    rare, common, usual = math.sqrt(1 / 0.2), math.sqrt(1 / 0.4), math.sqrt(1 / 0.8)
    assert found == pytest.approx([rare, usual, common, common, 1.0])


def test_factors_of_a_data_set_against_its_file(folder: Path, tmp_path: Path) -> None:
    """All demo classes are frequent, so one is made rare here."""
    raw = json.loads((folder / "train.json").read_text())
    rare, usual = raw["categories"][0]["id"], raw["categories"][1]["id"]
    for record in raw["annotations"][8:]:
        record["category_id"] = usual if record["category_id"] == rare else record["category_id"]
    (tmp_path / "rare.json").write_text(json.dumps(raw))
    per_image: dict[int, set[int]] = {}
    for record in raw["annotations"]:
        if not record.get("iscrowd"):
            per_image.setdefault(record["image_id"], set()).add(record["category_id"])
    dataset = CocoDataset(tmp_path / "rare.json", folder / "train")
    images = Counter(category for classes in per_image.values() for category in classes)
    indices = dataset.training_indices(True)
    assert set(dataset.image_ids[indices].tolist()) == set(per_image)
    config = CONFIG.model_copy(update={"sampling": RARE})
    found = repeat_factors(dataset, indices, config)
    wanted = [
        max(max(1.0, math.sqrt(3.0 / (images[c] / len(per_image)))) for c in per_image[int(number)])
        for number in dataset.image_ids[indices]
    ]
    assert found is not None and found == pytest.approx(wanted) and len(set(wanted)) > 1


def test_an_image_is_sampled_as_often_as_its_factor() -> None:
    factors = np.array([1.0, 2.0, 1.25, 0.3, 3.6])
    order, epochs = Repeats(factors, 7), 2000
    length = round(epochs * factors.sum())
    counts = np.bincount([order[k] for k in range(length)], minlength=5) / epochs
    # The standard error of a count is at most sqrt(0.25 / 2000).
    assert counts == pytest.approx(factors, abs=5 * math.sqrt(0.25 / epochs))
    # Integer factors are exact: images 0 and 1 once and twice in every epoch, never more than ceil(r) times.
    first = [order[k] for k in range(order._ends[0])]
    assert first.count(0) == 1 and first.count(1) == 2 and first.count(3) <= 1 and 3 <= first.count(4) <= 4


def test_order_is_a_function_of_seed_and_position() -> None:
    factors = np.array([1.0, 2.0, 1.25, 0.3, 3.6])
    running = [Repeats(factors, 7)[k] for k in range(60)]
    order = Repeats(factors, 7)
    assert [order[k] for k in reversed(range(60))] == running[::-1], "seeking equals iterating"
    assert [Repeats(factors, 8)[k] for k in range(60)] != running
    # Factors of 1 give the usual order.
    ones = Repeats(np.ones(7), 3)
    assert [ones[k] for k in range(30)] == [sample_index(k, 7, 3) for k in range(30)]


def test_weights_are_shares_of_the_samples() -> None:
    factors = np.array([1.0, 1.0, 2.0, 1.0, 4.0])
    parts = np.array([0, 0, 0, 1, 1])
    found = weighted(factors, parts, np.array([1.0, 3.0]))
    assert found.sum() == pytest.approx(factors.sum())
    assert found[:3].sum() / found.sum() == pytest.approx(0.25)
    assert found[2] == pytest.approx(2 * found[0]) and found[4] == pytest.approx(4 * found[3])


def test_data_sets_with_weights(folder: Path) -> None:
    """A set of 5 images gets half the samples beside one of 22; ratios within each set are kept."""
    train = (section(folder, "train", weight=1), section(folder, "val", weight=1))
    config = CONFIG.model_copy(update={"train": train})
    dataset = open_dataset(train)
    stream = TrainStream(dataset, config, 1)
    small = stream.indices >= 22
    assert stream.factors is not None and stream.factors[small].sum() == pytest.approx(
        stream.factors.sum() / 2
    )
    drawn = np.array([stream.image(k) >= 22 for k in range(4000)])
    assert drawn.mean() == pytest.approx(0.5, abs=0.03)
    text = sampling_text(dataset, config)
    assert "50.0% of the samples from" in text and text.count("\n") == 3
    assert sampling_text(dataset, CONFIG) == ""


def test_ranks_and_resumption(folder: Path) -> None:
    """Two ranks share the stream of one, and a loader that starts later continues it."""
    config = CONFIG.model_copy(update={"sampling": RARE})
    dataset = CocoDataset(folder / "train.json", folder / "train")
    one = train_loader(dataset, config, 4, seed=5)
    whole = [next(one).image_ids_B for _ in range(14)]
    halves = [train_loader(dataset, config, 2, rank, 2, start_micro_step=9, seed=5) for rank in range(2)]
    for step in range(9, 14):
        assert torch.equal(torch.cat([next(half).image_ids_B for half in halves]), whole[step])
    plain = train_loader(dataset, CONFIG, 4, seed=5)
    assert not torch.equal(torch.cat([next(plain).image_ids_B for _ in range(14)]), torch.cat(whole))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": [{"weight": 1}, {}]}, r"train\.0\.weight is given, and giantdet\.data\.train\.1 has none"),
        ({"train": {"weight": 1}}, r"data\.train\.weight is the share of one of several"),
        ({"val": [{"weight": 1}, {"weight": 2}]}, r"data\.val\.0\.weight is the share"),
        ({"train": [{"weight": 0}, {"weight": 2}]}, "weight must be greater than 0"),
        ({"sampling": {"type": "balanced"}}, r"sampling\.type must be one of"),
    ],
)
def test_meaningless_weights(data: dict[str, Any], message: str) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(one) for one in value]
        return {"annotations": "a.json", "images": "a", **value}

    block = {key: value if key == "sampling" else filled(value) for key, value in data.items()}
    with pytest.raises(ConfigError, match=message):
        parse_giantdet({"train": {"steps": 1}, "data": block})
