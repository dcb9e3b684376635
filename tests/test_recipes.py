"""The recipes' names, and the page generated from them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from giantdet.config.load import load_run

REPO = Path(__file__).resolve().parents[1]
RECIPES = sorted((REPO / "ds_configs").glob("*.json"))
NAME = re.compile(
    r"(?P<model>megdet(_challenge)?|retinanet|upernet|[a-z_]+?_(rcnn|fpn))_(?P<backbone>[a-z0-9_]+?)_(?P<batch>\d+)_(agvm_)?"
    r"(sgd|adamw)(_long|_released)?"
)
# These do not start from a number of GPUs.
FREE = {"demo", "mask_rcnn_resnet50_finetune_adamw"}


def page_maker() -> Any:
    spec = importlib.util.spec_from_file_location("recipes", REPO / "scripts/recipes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date() -> None:
    assert (REPO / "docs/recipes.md").read_text() == page_maker().render(), "run python scripts/recipes.py"


def test_names_describe_the_recipes() -> None:
    seen = 0
    for path in RECIPES:
        if path.stem in FREE:
            continue
        name = NAME.fullmatch(path.stem)
        assert name is not None, path.stem
        run = load_run(path)
        deepspeed, giantdet = run.deepspeed, run.giantdet
        assert int(name["batch"]) == deepspeed["train_batch_size"]
        assert deepspeed["optimizer"]["type"].lower() in path.stem
        assert giantdet.agvm.enabled == ("agvm" in path.stem)
        boxes_only = dict.fromkeys(("megdet", "megdet_challenge", "faster_rcnn"), "mask_rcnn")
        boxes_only["cascade_rcnn"] = "cascade_mask_rcnn"
        kind = boxes_only.get(name["model"], name["model"])
        assert giantdet.model.type == kind
        if kind in boxes_only.values():
            assert giantdet.model.mask_head.enabled == (name["model"] not in boxes_only)
        assert giantdet.train.output == f"runs/{path.stem}"
        family = ("vit", "eva") if name["backbone"].startswith("vitdet") else name["backbone"].split("_")[0]
        assert giantdet.model.backbone.name.startswith(family)
        seen += 1
    assert seen > 25


def test_the_papers_batch_sizes_exist() -> None:
    stems = {path.stem for path in RECIPES}
    assert {f"megdet_resnet50_{b}_sgd" for b in (16, 32, 64, 128, 256)} < stems
    assert "megdet_resnet50_256_sgd_long" in stems
    for model in ("faster_rcnn", "mask_rcnn"):
        assert {f"{model}_resnet50_{b}_agvm_sgd" for b in (32, 256, 512, 1024)} < stems
    assert {f"panoptic_fpn_resnet50_{b}_agvm_sgd" for b in (32, 256, 512, 1024)} < stems
    assert {f"semantic_fpn_resnet50_{b}_agvm_sgd" for b in (32, 512, 1024, 2048)} < stems
    assert {f"retinanet_resnet18_{b}_agvm_adamw" for b in (32, 4096, 10240)} < stems
    assert {f"faster_rcnn_resnet50_{b}_agvm_adamw" for b in (32, 256, 512, 1024, 1536)} < stems
    assert {f"mask_rcnn_swin_{s}_16_adamw" for s in ("tiny", "small", "base", "large")} < stems
    assert {f"mask_rcnn_vitdet_{s}_64_adamw" for s in ("base", "large", "huge")} < stems
    assert {f"mask_rcnn_vitdet_giant_{b}_agvm_adamw" for b in (32, 960)} < stems
