"""Write docs/recipes.md from the recipes in ds_configs/: python scripts/recipes.py

A test checks that the page is current. Learning rates and lengths are those of COCO train2017, or of
ADE20K's training set, on the recipe's GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from giantdet.commands.arguments import COCO_IMAGES
from giantdet.config.classes import Classes
from giantdet.config.load import RunConfig, load_run
from giantdet.config.resolve import resolve

REPO = Path(__file__).resolve().parents[1]
# Training images of COCO with objects, of COCO, and of ADE20K.
IMAGES = {"coco": COCO_IMAGES, "coco_panoptic": 118_287, "semantic_png": 20_210}
RECIPES, PAGE = REPO / "ds_configs", REPO / "docs/recipes.md"

HEAD = """# Recipes

You can start any file of `ds_configs/` as a whole run, or change it by overrides:

```bash
deepspeed scripts/train.py --deepspeed_config ds_configs/X.json train_batch_size=128
giantdet train --config ds_configs/X.json --print-config    # everything resolved
giantdet plot --schedule ds_configs/X.json                  # draws the learning rate
```

**Which one?** Look for your number of GPUs, or a larger one: on fewer GPUs a recipe keeps its batch by
gradient accumulation and trains the same, only slower (`tests/distributed/test_optim.py` compares the losses
of 4, 2 and 1 ranks to 1e-5). Only batch norms differ: with `"norm": "cgbn"` fewer ranks normalise fewer
images together, because each accumulated micro-batch is normalised separately; a run prints how many when
it starts.
Any number of GPUs works if its product with the micro-batch divides the batch. If you override the batch, the
learning rate follows in recipes with `lr_scaling`, and lengths in epochs stay the same.

**What is proven?** The demo and the fine-tuning recipe were run, on CPUs. The others were not: their expected
results are those of the work that they follow, and "memory not measured" means that you may have to lower the
images per GPU. `python scripts/recipes.py` writes this page.
"""


def main() -> None:
    PAGE.write_text(render())
    print(f"wrote {PAGE}")


def render() -> str:
    """Return the text of docs/recipes.md."""
    runs = [load_run(path) for path in sorted(RECIPES.glob("*.json"))]
    runs.sort(key=lambda run: (about(run)["gpus"], run.path.stem if run.path else ""))
    lines = [
        HEAD,
        "## By number of GPUs\n",
        "| GPUs | recipe | batch | optimizer, LR | AGVM | ZeRO | length | time |",
        "|---|---|---|---|---|---|---|---|",
        *(row(run) for run in runs),
        "\n## The recipes\n",
    ]
    return "\n".join([*lines, *(entry(run) for run in runs)])


def about(run: RunConfig) -> dict[str, Any]:
    assert isinstance(run.about, dict)
    return run.about


def row(run: RunConfig) -> str:
    assert run.path is not None
    gpus = about(run)["gpus"]
    assert run.giantdet.data.train is not None
    found = resolve(run, gpus, IMAGES[run.giantdet.data.train.format], Classes.numbered(80, 54))
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
