"""The shipped JSON Schema is up to date, accepts every recipe, and refuses what load_run refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jsonschema
import pytest

from giantdet.config.classes import Classes
from giantdet.config.load import load_run
from giantdet.config.resolve import describe, resolve
from giantdet.config.schema import SCHEMA_PATH, render

REPO = Path(__file__).parents[2]
RECIPES = sorted((REPO / "ds_configs").glob("*.json"))
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA_PATH.read_text()))


def test_shipped_schema_is_up_to_date() -> None:
    assert SCHEMA_PATH.read_text() == render(), "run python -m giantdet.config.schema"
    jsonschema.Draft202012Validator.check_schema(json.loads(render()))


def test_page_of_keys_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("keys", REPO / "scripts/keys.py")
    assert spec is not None and spec.loader is not None
    keys = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(keys)
    assert (REPO / "docs/keys.md").read_text() == keys.render(), "run python scripts/keys.py"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_valid_and_names_the_schema(recipe: Path) -> None:
    run = json.loads(recipe.read_text())
    VALIDATOR.validate(run)
    assert (recipe.parent / run["$schema"]).resolve() == SCHEMA_PATH.resolve()
    VALIDATOR.validate(json.loads(describe(resolve(load_run(recipe), 2, 100_000, Classes.numbered(80, 54)))))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("train_batch_sise",), 8),
        (("zero_optimization", "stage"), 4),
        (("zero_optimization", "stge"), 2),
        (("optimizer", "params", "learning_rate"), 1),
        (("scheduler", "params", "warmup_steps"), 1),
        (("optimizer", "type"), "AdamX"),
        (("giantdet", "modle"), {}),
        (("giantdet", "train", "steps"), "ten"),
        (("giantdet", "data", "augment"), {"flip": 2}),
        (("giantdet", "data", "size"), [64]),
        (("giantdet", "data", "size"), 0),
        (("bf16",), True),
    ],
)
def test_mistakes_are_refused(path: tuple[str, ...], value: object) -> None:
    run = json.loads((RECIPES[0].parent / "demo.json").read_text())
    node = run
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    assert not VALIDATOR.is_valid(run)


def test_a_canvas_is_a_side_or_a_pair() -> None:
    run = json.loads((RECIPES[0].parent / "demo.json").read_text())
    for size in (128, [128, 96]):
        run["giantdet"]["data"]["size"] = size
        VALIDATOR.validate(run)


def test_descriptions_come_from_the_docstrings() -> None:
    definitions = json.loads(SCHEMA_PATH.read_text())["$defs"]
    assert "timm" in definitions["BackboneConfig"]["properties"]["name"]["description"]
