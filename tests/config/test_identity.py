"""Which run may resume from which checkpoints."""

from __future__ import annotations

from typing import Any

import pytest

from giantdet.config.classes import Classes
from giantdet.config.identity import changes, identity, refusal
from giantdet.config.load import parse_run
from giantdet.config.resolve import describe, resolve
from giantdet.errors import ConfigError

CATS = Classes(objects=((1, "cat"), (2, "dog")))


def run_of(classes: Classes, **giantdet: Any) -> dict[str, Any]:
    raw = {
        "train_batch_size": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "giantdet": {"train": {"steps": 2}, **giantdet},
    }
    return identity(resolve(parse_run(raw), 1, 10, classes))


def test_the_same_run() -> None:
    assert refusal(run_of(CATS), run_of(CATS)) is None and changes(run_of(CATS), run_of(CATS)) == []
    assert refusal({}, run_of(CATS)) is None, "a checkpoint of an earlier version"


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (((1, "cat"), (2, "horse")), "class 1 was 'dog' (id 2) and is 'horse' (id 2) now"),
        (((2, "cat"), (1, "dog")), "class 0 was 'cat' (id 1) and is 'cat' (id 2) now"),
        (((1, "cat"),), "class 1 was 'dog' (id 2) and is missing now"),
        (((1, "cat"), (2, "dog"), (3, "cow")), "class 2 was missing and is 'cow' (id 3) now"),
    ],
)
def test_other_classes(classes: Any, words: str) -> None:
    problem = refusal(run_of(CATS), run_of(Classes(objects=classes)))
    assert problem is not None and words in problem


def test_other_models_are_refused_and_other_settings_named() -> None:
    before = run_of(CATS)
    problem = refusal(before, run_of(CATS, model={"type": "retinanet"}))
    assert problem == "saved with giantdet.model.type mask_rcnn, and this run has retinanet"
    problem = refusal(before, run_of(CATS, model={"conventions": "torchvision"}))
    assert problem is not None and "giantdet.model.conventions detectron2" in problem
    other = run_of(CATS, data={"size": [512, 512]}, norm={"type": "local"})
    assert refusal(before, other) is None
    first, second = changes(before, other)
    assert first == "giantdet.data.size was [1024, 1024] and is [512, 512] now" and "norm" in second


def test_the_resolved_run_stores_and_enforces_its_classes() -> None:
    raw = {
        "train_batch_size": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "giantdet": {"train": {"steps": 2}},
    }
    resolved = resolve(parse_run(raw), 1, 10, CATS)
    assert resolved.giantdet.data.classes == CATS
    assert '[1, "cat"]' in describe(resolved)
    raw["giantdet"]["data"] = {"classes": CATS.model_dump(mode="json")}
    assert resolve(parse_run(raw), 1, 10, CATS).giantdet.data.classes == CATS
    with pytest.raises(ConfigError, match="class 1 was 'dog'"):
        resolve(parse_run(raw), 1, 10, Classes(objects=((1, "cat"), (2, "cow"))))
