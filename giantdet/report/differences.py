"""In which keys two JSON objects differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

ABSENT = "–"


class Difference(NamedTuple):
    """A key by its dotted path, and its values as JSON texts; `ABSENT` where it is not given."""

    key: str
    before: Any
    now: Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[Difference]:
    """Return the differences, in the order of `now`; lists and scalars are compared as a whole."""
    found: list[Difference] = []
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key, ABSENT), now.get(key, ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{at}{key}.")
        elif isinstance(new, Mapping) and old == ABSENT and new:
            found += differences({}, new, f"{at}{key}.")
        elif old != new:
            found.append(Difference(at + key, old, new))
    return found
