"""Which maps an evaluation keeps for pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from giantdet.distributed import comm
from giantdet.evaluation.examples import EACH, Examples, random_order


def offer(examples: Examples, scores: dict[int, float]) -> None:
    for image_id, score in scores.items():
        examples.add(image_id, score, torch.full((3, 4), image_id))


SCORES = {n: ((n * 37) % 50) / 50 for n in range(50)} | {60: math.nan}


def ids(examples: Examples) -> dict[str, list[int]]:
    return {kind: [e.image_id for e in kept] for kind, kept in examples.kept.items()}


def test_best_worst_and_random() -> None:
    examples = Examples()
    offer(examples, SCORES)
    scored = {n: s for n, s in SCORES.items() if s == s}
    order = sorted(scored, key=lambda n: scored[n])
    assert ids(examples) == {
        "best": order[: -EACH - 1 : -1],
        "worst": order[:EACH],
        "random": sorted(scored, key=random_order)[:EACH],
    }


def test_ranks_together_keep_what_one_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Examples(), [Examples() for _ in range(3)]
    offer(whole, SCORES)
    for rank, part in enumerate(parts):
        offer(part, {n: s for n, s in SCORES.items() if n % 3 == rank})
    monkeypatch.setattr(comm, "gather_objects", lambda _: [part.kept for part in parts])
    merged = Examples()
    merged.merge()
    assert merged.kept == whole.kept


def test_saved_maps(tmp_path: Path) -> None:
    examples = Examples()
    offer(examples, {5: 0.5, 6: 0.25})
    folder = tmp_path / "maps"
    folder.mkdir()
    (folder / "1.png").write_bytes(b"of an earlier evaluation")
    records: list[dict[str, Any]] = examples.save(folder)
    assert {(r["kind"], r["image_id"]) for r in records} == {
        (kind, n) for kind in ("best", "worst", "random") for n in (5, 6)
    }
    assert sorted(path.name for path in folder.iterdir()) == ["5.png", "6.png"]
    assert (np.asarray(Image.open(folder / "5.png")) == np.full((3, 4), 5)).all()
