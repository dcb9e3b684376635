"""A panoptic and two semantic models, trained and evaluated on a data set with everything they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import MODEL

from giantdet.architectures import build_model, total_loss
from giantdet.config.architectures import SECTIONS, ArchitectureConfig
from giantdet.config.architectures.panoptic_fpn import PanopticFpnConfig
from giantdet.config.classes import Classes
from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.loader import train_loader
from giantdet.data.panoptic import PanopticMap, Segment
from giantdet.engine.evaluate import Evaluation, evaluate
from giantdet.structures import IGNORE

CONFIG = DataConfig(size=(64, 64), short_side=64, max_objects=8, mask_frame=66, workers=0)


class Scenes(CocoDataset):
    """The demo set with two kinds of stuff as background, above and below, and an unlabelled strip."""

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder / f"{split}.json", folder / split)
        semantic = ((0, "things"), (101, "above"), (102, "below"))
        self.classes = Classes(objects=self.classes.objects, semantic=semantic)

    def semantic_map(self, i: int) -> NDArray[np.uint8]:
        objects = self.objects(i)
        found = np.ones(objects.size_hw, np.uint8)
        found[len(found) // 2 :] = 2
        found[objects.masks().any(0)] = 0
        found[:2] = IGNORE
        return found

    def panoptic_map(self, i: int) -> PanopticMap:
        semantic, objects = self.semantic_map(i), self.objects(i)
        ids = np.where(semantic == IGNORE, 0, semantic).astype(np.int32)
        segments = [Segment(n, self.classes.stuff[n - 1][0]) for n in (1, 2) if (ids == n).any()]
        for n, mask in enumerate(objects.masks(), 3):
            ids[mask & (semantic == 0)] = n
            segments.append(Segment(n, self.category_ids[objects.labels_N[n - 3]]))
        return PanopticMap(ids, segments)


def train_and_evaluate(config: ArchitectureConfig, folder: Path, out: Path) -> Evaluation:
    torch.manual_seed(0)
    model, training = build_model(config, (64, 64)), Scenes(folder, "train")
    batch = next(train_loader(training, CONFIG, 2, targets=model.targets))
    assert batch.targets.semantic_BHW.shape == (2, 64, 64)
    losses = model.train().losses(model(batch), batch)
    total_loss(losses).backward()  # type: ignore[no-untyped-call]
    assert losses["loss_sem_seg"] > 0
    return evaluate(
        model.eval(),
        Scenes(folder, "val"),
        CONFIG,
        2,
        torch.device("cpu"),
        tasks=model.tasks,
        model_config=config,
        classes=training.classes,
        results=out / "results.json",
    )


def test_panoptic_model(demo_data: Path, tmp_path: Path) -> None:
    raw = {
        **MODEL,
        "type": "panoptic_fpn",
        "num_classes": 4,
        "num_stuff_classes": 2,
        "semantic_head": {"width": 32},
    }
    found = train_and_evaluate(PanopticFpnConfig.model_validate(raw), demo_data, tmp_path)
    assert set(found.scores) == {"box", "mask", "semantic", "panoptic"}
    assert found.primary == found.scores["panoptic"]["PQ"]
    assert {"above", "below"} < set(found.scores["panoptic"]["per_class"])
    assert len(list((tmp_path / "results_panoptic").iterdir())) == 5
    assert "mIoU" in found.table and "PQ by class" in found.table


@pytest.mark.parametrize(
    "parts",
    [
        {"type": "semantic_fpn", "fpn": MODEL["fpn"], "semantic_head": {"width": 32}},
        {"type": "upernet", "decode_head": {"width": 32}, "auxiliary_head": {"width": 16}},
    ],
)
def test_semantic_models(demo_data: Path, tmp_path: Path, parts: dict[str, Any]) -> None:
    section = SECTIONS[parts["type"]]
    raw = {"num_classes": 3, "backbone": MODEL["backbone"], **parts}
    found = train_and_evaluate(section.model_validate(raw), demo_data, tmp_path)
    assert set(found.scores) == {"semantic"}
    assert set(found.scores["semantic"]["per_class"]) == {"things", "above", "below"}
    assert found.primary == found.scores["semantic"]["mIoU"] >= 0
