"""What an evaluation asks of a metric, and which number a run is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from giantdet.config.conventions import Conventions
from giantdet.data.dataset import Dataset
from giantdet.structures import Batch, Outputs

Scores = dict[str, dict[str, Any]]
"""Numbers by task: {"box": {"AP": 0.4, ...}, "mask": ...}."""


class Evaluator(Protocol):
    """One family of metrics over a data set. A new one is a file, and a line in `evaluation/__init__.py`."""

    PRIMARY: ClassVar[Mapping[str, str]]
    """The number that each of its tasks is judged by: {"box": "AP", "mask": "AP"}."""

    def __init__(
        self, dataset: Dataset, tasks: Sequence[str], category_ids: Sequence[int], conventions: Conventions
    ) -> None:
        """`tasks` are those of PRIMARY that the model predicts, `category_ids` belong to its classes."""
        ...

    def add(self, outputs: Outputs, batch: Batch) -> None:
        """Take in what the model found in one batch of this rank."""
        ...

    def merge(self) -> None:
        """Bring what all ranks took in to the main rank. All ranks call it."""
        ...

    def scores(self) -> Scores:
        """The numbers of each task, after `merge` on the main rank."""
        ...

    def save(self, file: Path) -> None:
        """Write the results in the metric's usual format: `file`, or beside it under a name of their own."""
        ...

    def table(self, scores: Scores) -> str:
        """The scores as text."""
        ...


def primary_score(scores: Scores, tasks: Sequence[str], numbers: Mapping[str, str]) -> float | None:
    """The number that a model is judged by: that of its last task that was scored; None without any."""
    scored = [task for task in tasks if task in scores]
    return float(scores[scored[-1]][numbers[scored[-1]]]) if scored else None
