"""One rank of test_metrics_over_ranks.py: every architecture's evaluation of a small set.

worker_metrics.py FOLDER CASES_JSON; a case is {"kind", "data", "window_stride"}. Writes FOLDER/CASE.pt with
the scores and the validation pictures, and the results of the metrics into FOLDER/CASE/.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_util
from tiny import tiny_run
from torch import Tensor, nn
from worker_zero import run_cases

from giantdet.architectures import build_model
from giantdet.config.load import parse_run
from giantdet.config.resolve import resolve
from giantdet.config.resolved import ResolvedRun
from giantdet.data.dataset import Dataset, open_dataset
from giantdet.distributed import comm
from giantdet.engine.evaluate import evaluate
from giantdet.engine.trackers import validation_pictures
from giantdet.errors import DataError
from giantdet.structures import Batch, Detections, Outputs

SLOTS, SIDE = 10, 28


class Helped(nn.Module):
    """An untrained model whose detections are replaced by true objects with all kinds of mistakes.

    Semantic maps are the model's own, so that the scores depend on its computation to the bit.
    """

    def __init__(self, model: nn.Module, dataset: Dataset) -> None:
        super().__init__()
        self.model, self.dataset = model, dataset
        self.index = {int(image_id): i for i, image_id in enumerate(dataset.image_ids)}

    def forward(self, batch: Batch) -> Outputs:
        outputs: Outputs = self.model(batch)
        if outputs.detections is None:
            return outputs
        rows = [
            self.detections(int(image_id), batch.sizes_B2[b]) for b, image_id in enumerate(batch.image_ids_B)
        ]
        boxes, scores, labels, valid, masks = (torch.stack(column) for column in zip(*rows, strict=True))
        has_masks = outputs.detections.masks_BDSS is not None
        found = Detections(boxes, scores, labels, valid, masks if has_masks else None)
        return outputs._replace(detections=found)

    def detections(self, image_id: int, size_2: Tensor) -> tuple[Tensor, ...]:
        boxes, scores = np.zeros((SLOTS, 4), np.float32), np.zeros(SLOTS, np.float32)
        labels, masks = np.zeros(SLOTS, np.int64), np.zeros((SLOTS, SIDE, SIDE), np.float32)
        valid = np.zeros(SLOTS, bool)
        objects = self.dataset.objects(self.index[image_id]) if image_id >= 0 else []
        rng = np.random.default_rng(image_id + 1)
        classes = len(self.dataset.classes.objects)
        for n in range(min(len(objects), SLOTS)):
            box = objects.boxes_N4[n] + rng.normal(0, 1.0, 4).astype(np.float32)
            x0, y0, x1, y1 = box.clip(0, 64)
            if x1 - x0 < 2 or y1 - y0 < 2 or rng.random() < 0.2:  # missed
                continue
            rows = np.linspace(y0, y1 - 1, SIDE).round().astype(int).clip(0, 63)
            columns = np.linspace(x0, x1 - 1, SIDE).round().astype(int).clip(0, 63)
            try:
                mask = mask_util.decode(objects.rle(n))
            except DataError:  # its map cannot be read
                continue
            boxes[n], masks[n], valid[n] = (x0, y0, x1, y1), mask[rows][:, columns], True
            labels[n] = rng.integers(classes) if rng.random() < 0.2 else objects.labels_N[n]
            scores[n] = round(float(rng.random()), 1)  # with ties
        scale = float(size_2[0]) / 64
        arrays = (boxes * scale, scores, labels, valid, masks)
        return tuple(torch.from_numpy(np.asarray(array)) for array in arrays)


class Writer:
    """What DeepSpeed's TensorBoard monitor is for pictures, and its summary writer."""

    def __init__(self) -> None:
        self.summary_writer = self
        self.pictures: dict[str, NDArray[np.uint8]] = {}

    def add_image(self, name: str, picture: NDArray[np.uint8], x: int, dataformats: str) -> None:
        assert (x, dataformats, name in self.pictures) == (5, "HWC", False)
        self.pictures[name] = picture

    def flush(self) -> None:
        pass


def run_of(kind: str, data: Path) -> tuple[ResolvedRun, Dataset]:
    """A resolved run of one architecture, and its validation set."""
    run = parse_run(tiny_run(data, data, kind, tensorboard__enabled=True))
    assert run.giantdet.data.val is not None
    dataset = open_dataset(run.giantdet.data.val)
    return resolve(run, comm.world_size(), 10, dataset.classes, has_gpu=False), dataset


def result_of(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The scores of an evaluation by all ranks."""
    run, dataset = run_of(case["kind"], Path(case["data"]))
    data = run.giantdet.data
    stride = case.get("window_stride")
    if stride is not None:
        data = data.model_copy(update={"size": (32, 32), "short_side": 48})
    torch.manual_seed(0)
    model = build_model(run.giantdet.model, data.size, run.giantdet.norm).eval()
    if comm.is_main():
        folder.mkdir()
    writer = Writer()
    pictures = validation_pictures(run, SimpleNamespace(tb_monitor=writer), dataset, model)
    assert pictures is not None
    found = evaluate(
        Helped(model, dataset),
        dataset,
        data,
        case.get("batch_size", 2),
        torch.device("cpu"),
        tasks=model.tasks,
        model_config=run.giantdet.model,
        classes=run.giantdet.model.predicted(dataset.classes),
        window_stride=stride,
        results=folder / "results.json",
        observers=[pictures],
    )
    shown = {
        image_id: [(record["score"], *record["bbox"]) for record in one.to_coco(image_id)]
        for image_id, one in sorted(pictures.found.items())
    }
    if comm.is_main():
        pictures.write(5)
    return {
        "scores": found.scores,
        "primary": found.primary,
        "table": found.table,
        "shown": shown,
        "pictures": {name: torch.from_numpy(picture.copy()) for name, picture in writer.pictures.items()},
    }


if __name__ == "__main__":
    run_cases(result_of)
