"""The model card of an export: what it is, its scores, its classes, how it was trained and how it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from giantdet.config.resolve import describe
from giantdet.config.resolved import ResolvedRun, load_resolved
from giantdet.errors import ConfigError
from giantdet.export import ExportConfig, read_export_config
from giantdet.export_folder import export_folder

_SHOWN_CLASSES = 200
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")  # their names of folders and teams are private


def model_card(source: Path, repository: str) -> str:
    """Return the README.md of an export, for the repository OWNER/NAME of the Hugging Face hub.

    `source` is a run, whose scores and JSON are in it, or an export alone. Paths of data are left out, and
    the licence is for the user to add. Raises InputError for a folder that is no export.
    """
    config = read_export_config(export_folder(source))
    run = _run_of(source)
    parts = [
        _header(config),
        f"# {repository.split('/')[-1]}",
        _summary(config, run),
        _usage(repository),
        _scores(source / "scores.json"),
        _classes("objects", config.categories),
        _classes("semantic maps", config.semantic_categories),
        "" if run is None else _training(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _run_of(source: Path) -> ResolvedRun | None:
    try:
        return load_resolved(source / "config.json")
    except (ConfigError, OSError):
        return None  # the config.json of an export, or none


def _header(config: ExportConfig) -> str:
    pipeline = "image-segmentation" if config.semantic_categories else "object-detection"
    tags = ["giantdet", config.model.type, config.model.backbone.name]
    lines = ["library_name: giantdet", f"pipeline_tag: {pipeline}", "tags:"]
    return "\n".join(["---", *lines, *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def _summary(config: ExportConfig, run: ResolvedRun | None) -> str:
    height, width = config.size
    backbone = config.model.backbone.name
    text = (
        f"`{config.model.type}` with the backbone `{backbone}`, made with giantdet {config.version}. "
        f"Images are scaled to a short side of {config.short_side} pixels, on a canvas of {height} x {width}."
    )
    about = None if run is None else run.about
    what = about.get("what") if isinstance(about, dict) else about
    return f"{what}.\n\n{text}" if what else text


def _usage(repository: str) -> str:
    return f"""## Use

```python
from giantdet import load_predictor

predictor = load_predictor("hf_hub:{repository}")
found = predictor("image.jpg", threshold=0.5)  # boxes, scores, names and masks, in pixels of the image
found.save("picture.png")
```"""


def _scores(file: Path) -> str:
    """Return a table with a row for each task, of the numbers that the run has written."""
    try:
        scores: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return ""
    tables = []
    for task, values in scores.items():
        if not isinstance(values, dict):
            continue
        numbers = {
            k: v for k, v in values.items() if isinstance(v, float | int) and v >= 0
        }  # COCO's -1: none
        head = " | ".join([task, *numbers])
        row = " | ".join(["", *(f"{value:.3f}" for value in numbers.values())])
        tables.append(f"| {head} |\n|{'---|' * (len(numbers) + 1)}\n| {row} |")
    return "\n\n".join(["## Scores on the validation set", *tables]) if tables else ""


def _classes(what: str, categories: tuple[tuple[int, str], ...]) -> str:
    if not categories:
        return ""
    names = ", ".join(f"{name} ({number})" for number, name in categories[:_SHOWN_CLASSES])
    more = f" and {len(categories) - _SHOWN_CLASSES} more" if len(categories) > _SHOWN_CLASSES else ""
    return f"## Classes of {what}\n\n{len(categories)}, with the ids of the training data: {names}{more}."


def _training(run: ResolvedRun) -> str:
    """Return the run in words, and its JSON without paths of this machine."""
    whole = json.loads(describe(run))
    for key in ("about", *_MONITORS):
        whole.pop(key, None)
    settings = whole["giantdet"]
    settings["data"] |= {"train": None, "val": None}
    settings["train"]["output"] = "runs/mine"
    settings["model"]["init_weights"] = settings["model"]["backbone"]["init_weights"] = None
    text, steps = json.dumps(whole, indent=2), run.giantdet.train.steps
    lr, schedule = run.optimizer.lr, "constant" if run.scheduler is None else run.scheduler.name
    return f"""## Training

{steps} steps with a batch of {run.batch.total}, {run.optimizer.name} with an LR of {lr:g} ({schedule}),
ZeRO stage {run.stage}, {run.precision}. The JSON of the run, without its data, initial weights and monitors:

<details><summary>config.json</summary>

```json
{text}
```

</details>"""
