"""Rows of class layers are transferred by name, for every architecture, against a loop over the rows."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import MODELS
from torch import Tensor

from giantdet.architectures import Architecture, build_model
from giantdet.config.architectures import SECTIONS, ArchitectureConfig
from giantdet.config.architectures.common import NormConfig
from giantdet.config.classes import Classes
from giantdet.config.load import parse_run
from giantdet.config.resolve import resolve
from giantdet.export import export_config, load_weights
from giantdet.layers.deferred import deferred_init, real_parameters

OLD = Classes(
    objects=((1, "cat"), (3, "dog"), (4, "cow")),
    semantic=((0, "things"), (7, "sky"), (8, "road"), (9, "tree")),
)
NEW = Classes(
    objects=((1, "cow"), (2, "horse"), (5, "cat"), (6, "pig")),
    semantic=((0, "things"), (7, "water"), (8, "tree"), (9, "sky")),
)


def model_of(kind: str, classes: Classes, **changes: Any) -> tuple[Architecture, ArchitectureConfig, Any]:
    raw = {
        "train_batch_size": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "giantdet": {
            "model": {**MODELS[kind], **changes},
            "train": {"steps": 2},
            "data": {"size": [64, 64], "short_side": 64},
        },
    }
    run = resolve(parse_run(raw), 1, 10, classes)
    model = build_model(run.giantdet.model, (64, 64), NormConfig(type="local"))
    return model, run.giantdet.model, export_config(run, run.giantdet.data.classes)


def blocks(layer: Any, rows: Tensor, count: int) -> list[list[Tensor]]:
    """Return the rows of each class in each block; the last entry has those of background and things."""
    size, found = len(rows) // layer.blocks, []
    for b in range(layer.blocks):
        block = rows[b * size : (b + 1) * size]
        inside = block[layer.before : size - layer.after]
        per_class = [inside[c * layer.values : (c + 1) * layer.values] for c in range(count)]
        found.append([*per_class, torch.cat([block[: layer.before], block[size - layer.after :]])])
    return found


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("kind", SECTIONS)
def test_rows_follow_the_names(
    kind: str,
    deferred: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Holds for a model built for ZeRO-3 too, whose weights are not allocated yet."""
    torch.manual_seed(0)
    old, _, about = model_of(kind, OLD)
    save_file({k: v.contiguous() for k, v in old.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(about.model_dump_json())
    monkeypatch.setattr("giantdet.layers.deferred.LARGE", 1)
    built = []
    for _ in range(2):
        torch.manual_seed(1)
        with deferred_init(0) if deferred else nullcontext():
            built.append(model_of(kind, NEW, init_weights=str(tmp_path)))
    (start, _, _), (new, config, exported) = built
    list(real_parameters(start, torch.float32))  # the initialisation without a file
    fresh = start.state_dict()
    with caplog.at_level(logging.WARNING, "giantdet"):
        load_weights(new, config, exported.classes)
    list(real_parameters(new, torch.float32))
    found, source = new.state_dict(), old.state_dict()
    checked = set()
    for layer in new.class_layers():
        before, after = ([name for _, name in getattr(c, layer.kind)] for c in (OLD, NEW))
        for key in [key for key in found if key.startswith(layer.prefix)]:
            checked.add(key)
            theirs = blocks(layer, source[key], len(before))
            untouched, ours = (blocks(layer, s[key], len(after)) for s in (fresh, found))
            for block, start, origin in zip(ours, untouched, theirs, strict=True):
                for name, rows, first in zip(after, block, start, strict=False):
                    expected = origin[before.index(name)] if name in before else first
                    assert torch.equal(rows, expected), (key, name)
                assert torch.equal(block[-1], origin[-1]), f"background of {key}"
    assert checked and all(torch.equal(found[k], source[k]) for k in found.keys() - checked)
    text = caplog.text
    if exported.classes.objects:
        assert "taken over: cow, cat" in text and "new weights for: horse, pig" in text
    if exported.classes.semantic:
        assert "new weights for: water" in text


def test_the_same_classes_in_another_order_print_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, _, about = model_of("mask_rcnn", OLD)
    save_file({k: v.contiguous() for k, v in old.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(about.model_dump_json())
    reordered = Classes(objects=tuple(reversed(OLD.objects)))
    new, config, exported = model_of("mask_rcnn", reordered, init_weights=str(tmp_path))
    with caplog.at_level(logging.WARNING, "giantdet"):
        load_weights(new, config, exported.classes)
    rows = new.state_dict()["box_head.classes.weight"]
    assert torch.equal(rows, old.state_dict()["box_head.classes.weight"][[2, 1, 0, 3]])
    assert "new weights" not in caplog.text


def test_classes_of_another_data_set_match_under_other_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Names of Objects365, as its file spells them, match those of COCO."""
    theirs = Classes(objects=((1, "Person"), (38, "Moniter/TV"), (62, "Cell Phone")))
    ours = Classes(objects=((72, "tv"), (77, "cell phone"), (81, "sink"), (1, "person")))
    old, _, about = model_of("mask_rcnn", theirs)
    save_file({k: v.contiguous() for k, v in old.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(about.model_dump_json())
    new, config, exported = model_of("mask_rcnn", ours, init_weights=str(tmp_path))
    with caplog.at_level(logging.WARNING, "giantdet"):
        load_weights(new, config, exported.classes)
    rows, source = (m.state_dict()["box_head.classes.weight"] for m in (new, old))
    assert torch.equal(rows[[0, 1, 3, 4]], source[[1, 2, 0, 3]])
    assert "'tv' from 'Moniter/TV', 'cell phone' from 'Cell Phone', 'person' from 'Person'" in caplog.text
    assert "taken over: tv, cell phone, person; new weights for: sink" in caplog.text
