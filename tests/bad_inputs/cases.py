"""A row of the table."""

from __future__ import annotations

from typing import Any, NamedTuple


class Error(NamedTuple):
    """The command ends with exit code 2 and this line; `...` stands for anything."""

    line: str


class Skipped(NamedTuple):
    """The record is left out and counted by this kind; the rest is used for training and evaluation."""

    kind: str
    records: int = 1


class Noted(NamedTuple):
    """The record is used, but not as it is written, and counted by this kind."""

    kind: str
    how: str
    records: int = 1


class Replaced(NamedTuple):
    """The image is replaced by the next one, named with this reason and counted."""

    reason: str


class Works(NamedTuple):
    """The input is usable."""

    how: str


class Case(NamedTuple):
    what: str
    make: Any  # the input, as the docstring of each module says
    outcome: Error | Skipped | Noted | Replaced | Works
