"""A checkpoint that does not match the run: one line that names the first difference."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from giantdet.checkpoint.files import FORMAT, MANIFEST, STATE, SavedTensors, manifest_text, write_text
from giantdet.checkpoint.state import check_fit


def _engine(width: int, *groups: str) -> Any:
    """The inspected parts of an engine: a model, and an optimizer with named groups."""
    model = nn.Linear(width, 2)
    parameters = list(model.parameters())
    named = [{"params": parameters[i::2], "name": name} for i, name in enumerate(groups)]
    return SimpleNamespace(module=model, basic_optimizer=torch.optim.SGD(named, lr=1.0))


@pytest.fixture
def saved(tmp_path: Path) -> SavedTensors:
    parameters = {"weight": {"shape": [2, 3]}, "bias": {"shape": [2]}}
    state = {"format": FORMAT, "groups": ["backbone", "fpn"], "parameters": parameters}
    write_text(tmp_path / STATE, json.dumps(state))
    write_text(tmp_path / MANIFEST, manifest_text({"files": {}}))
    return SavedTensors(tmp_path)


def test_the_same_model_matches_in_any_order_of_groups(saved: SavedTensors) -> None:
    check_fit(_engine(3, "fpn", "backbone"), saved, {})


def test_other_groups_are_named(saved: SavedTensors) -> None:
    with pytest.raises(ValueError, match="groups: fpn is only in the checkpoint; 2 groups differ"):
        check_fit(_engine(3, "backbone", "rpn"), saved, {})


def test_another_shape_is_named(saved: SavedTensors) -> None:
    with pytest.raises(ValueError, match=r"weight is \[2, 3\], in the run \[2, 4\]; 1 parameters differ"):
        check_fit(_engine(4, "backbone", "fpn"), saved, {})
