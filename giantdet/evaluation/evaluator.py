"""The interface of metrics, and the number that runs are compared by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from giantdet.config.architectures.common import ArchitectureConfig
from giantdet.config.classes import Classes
from giantdet.config.types import Backend
from giantdet.data.dataset import Dataset
from giantdet.structures import Batch, Outputs

Scores = dict[str, dict[str, Any]]
"""Numbers by task: {"box": {"AP": 0.4, ...}, "mask": ...}; None where there is nothing to score.

COCO's numbers are -1 there, as in pycocotools.
"""
NOTHING_TO_SCORE = -1.0


class Evaluator(Protocol):
    """A family of metrics over a data set. A new one is a file, and a line in `evaluation/__init__.py`."""

    PRIMARY: ClassVar[Mapping[str, str]]
    """The main number of each of its tasks: {"box": "AP", "mask": "AP"}."""
    WINDOWS: ClassVar[bool]
    """True if it joins what was predicted in several windows of an image."""
    PROTOCOL: ClassVar[str | None]
    """`Dataset.protocol` of the data sets that it scores; None: all."""

    def __init__(
        self,
        dataset: Dataset,
        tasks: Sequence[str],
        classes: Classes,
        model: ArchitectureConfig,
        max_detections: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        """Create an evaluator of the `tasks` of PRIMARY that the model predicts.

        `classes` are those that it predicts, `model` is its section; for `max_detections` and `backend` see
        `EvalConfig`.
        """
        ...

    def add(self, outputs: Outputs, batch: Batch) -> None:
        """Add the model's outputs for one batch of this rank."""
        ...

    def merge(self) -> None:
        """Collect the outputs of all ranks on the main rank. All ranks call it."""
        ...

    def scores(self) -> Scores:
        """Return the numbers of each task. It is called on the main rank, after `merge`."""
        ...

    def save(self, file: Path) -> None:
        """Write the results in the metric's usual format, to `file` or to another name in the same folder."""
        ...

    def table(self, scores: Scores) -> str:
        """Return the scores as text."""
        ...


def primary_score(scores: Scores, tasks: Sequence[str], numbers: Mapping[str, str]) -> float | None:
    """Return the number that models are compared by, that of the last scored task; None without scores."""
    scored = [task for task in tasks if task in scores]
    value = scores[scored[-1]][numbers[scored[-1]]] if scored else None
    return None if value is None else float(value)


def shown(value: float | None) -> str:
    """Return a score as a cell of a table, 7 characters wide; "-" where there is nothing to score."""
    return f"{'-':>7}" if value is None or value == NOTHING_TO_SCORE else f"{value:>7.3f}"
