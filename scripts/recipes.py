"""Writes docs/recipes.md from the recipes in ds_configs/: python scripts/recipes.py

A test holds the page current. Learning rates and lengths are those of COCO train2017 at the recipe's GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from giantdet.cli import COCO_IMAGES
from giantdet.config.load import RunConfig, load_run
from giantdet.config.resolve import resolve

REPO = Path(__file__).resolve().parents[1]
RECIPES, PAGE = REPO / "ds_configs", REPO / "docs/recipes.md"

HEAD = """# Recipes

Every file of `ds_configs/` is a whole run. This page is made from them by `python scripts/recipes.py`.

**Which one?** Look for your number of GPUs, or a larger one: a recipe keeps its batch on fewer GPUs by
gradient accumulation and then trains the same, only slower (`tests/distributed/test_optim.py` holds the
losses of 4, 2 and 1 ranks to 1e-5). What does change are batch norms: with `"norm": "cgbn"` fewer ranks
have fewer images to normalise together, as accumulated micro-batches are normalised each by itself; the
start of a run says how many. Any number of GPUs goes whose product with the images of a micro-batch divides
the batch. For another batch, override it: `train_batch_size=128`. Where a recipe has `lr_scaling`, its
learning rate follows, and lengths in epochs stay what they are.

**What is proven?** The demo and the fine-tuning recipe were run, on CPUs. All others were not: the numbers in
their last column are those of the work they follow, and "memory not measured" means that the images a GPU may
have to go down. `giantdet plot --schedule ds_configs/X.json` draws a learning rate, `giantdet train --config
ds_configs/X.json --print-config` prints everything resolved.
"""


def main() -> None:
    PAGE.write_text(render())
    print(f"wrote {PAGE}")


def render() -> str:
    """The text of docs/recipes.md."""
    runs = [load_run(path) for path in sorted(RECIPES.glob("*.json"))]
    runs.sort(key=lambda run: (about(run)["gpus"], run.path.stem if run.path else ""))
    lines = [
        HEAD,
        "## By number of GPUs\n",
        "| GPUs | recipe | batch | optimizer, LR | AGVM | ZeRO | length | time |",
        "|---|---|---|---|---|---|---|---|",
        *(row(run) for run in runs),
        "\n## What each one is\n",
    ]
    return "\n".join([*lines, *(entry(run) for run in runs)])


def about(run: RunConfig) -> dict[str, Any]:
    assert isinstance(run.about, dict)
    return run.about


def row(run: RunConfig) -> str:
    assert run.path is not None
    gpus = about(run)["gpus"]
    found = resolve(run, gpus, COCO_IMAGES, 80)
    train, batch, optimizer = found.giantdet.train, found.batch, found.optimizer
    epochs = run.giantdet.train.epochs
    length = f"{train.steps:,} steps" if epochs is None else f"{epochs:g} epochs, {train.steps:,} steps"
    cells = [
        gpus,
        f"[{run.path.stem}](#{run.path.stem})",
        f"{batch.total} = {gpus} x {batch.micro}",
        f"{optimizer.name}, {optimizer.lr:.3g}",
        "yes" if found.giantdet.agvm.enabled else "",
        found.stage,
        length,
        about(run)["time"],
    ]
    return f"| {' | '.join(map(str, cells))} |"


def entry(run: RunConfig) -> str:
    assert run.path is not None
    text = about(run)
    lines = [f"### {run.path.stem}\n", f"{text['what']}.\n", f"```bash\n{text['command']}\n```\n"]
    lines.append(f"- Hardware: {text['hardware']}.")
    lines.append(f"- Expected: {text['expected']}.")
    lines.append(f"- Time: {text['time']}.")
    if "differs" in text:
        lines.append(f"- Differs from its source: {text['differs']}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
