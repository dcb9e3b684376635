"""A row of the table."""

from __future__ import annotations

from typing import Any, NamedTuple


class Error(NamedTuple):
    """The command ends with code 2 and this line; `...` stands for anything."""

    line: str


class Skipped(NamedTuple):
    """The record is left out and counted by this kind; what is left is trained and evaluated on."""

    kind: str
    records: int = 1


class Noted(NamedTuple):
    """The record is used, but not as it is written, and is counted by this kind."""

    kind: str
    how: str
    records: int = 1


class Replaced(NamedTuple):
    """The image gives way to the next one, is named with this reason and counted."""

    reason: str


class Works(NamedTuple):
    """It is usable."""

    how: str


class Case(NamedTuple):
    what: str
    make: Any  # as the comment above each list says
    outcome: Error | Skipped | Noted | Replaced | Works
