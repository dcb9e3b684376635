"""Predictions for the validation set of a run that has none, by its export."""

from __future__ import annotations

from pathlib import Path

import torch

from giantdet.config.json_text import json_text
from giantdet.config.resolved import load_resolved
from giantdet.data.dataset import meet, open_dataset
from giantdet.engine.evaluate import evaluate
from giantdet.engine.progress import shown_batches
from giantdet.errors import InputError
from giantdet.export import load_detector
from giantdet.report.run import RESULTS


def why_not_predicted(folder: Path) -> str | None:
    """Return why a run cannot be evaluated from its folder, or None if it can."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json in it; give the folder of a run, its train.output")
    if load_resolved(folder / "config.json").giantdet.data.val is None:
        return "no data.val"
    if not (folder / "export" / "config.json").is_file():
        return f"no export: giantdet export {folder} makes one"
    return None


def predict_validation(folder: Path, device: str | None = None) -> None:
    """Evaluate FOLDER/export on data.val; writes results.json and scores.json as training does.

    Raises InputError for an export or a data set that cannot be used.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = load_resolved(folder / "config.json").giantdet
    assert config.data.val is not None
    model, exported = load_detector(folder / "export", chosen)
    dataset = open_dataset(config.data.val)
    found = evaluate(
        model,
        dataset,
        config.data,
        config.eval.batch_size,
        chosen,
        tasks=model.tasks,
        model_config=exported.model,
        classes=meet(dataset, exported.classes, folder / "export"),
        window_stride=config.eval.window_stride,
        max_detections=config.eval.max_detections,
        backend=config.eval.backend,
        results=folder / RESULTS,
        tta=config.eval.tta,
        batches=shown_batches,
    )
    (folder / "scores.json").write_text(json_text(found.scores, indent=2) + "\n")
    print(found.table, flush=True)
