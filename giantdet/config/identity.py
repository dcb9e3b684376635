"""The identity of a run. A checkpoint with another identity is refused, or the changes are named."""

from __future__ import annotations

from typing import Any

from giantdet.config.classes import Category, Classes
from giantdet.config.resolved import ResolvedRun

_MUST_AGREE = ("model.type", "model.conventions", "objects", "semantic")


def identity(run: ResolvedRun) -> dict[str, Any]:
    """Return, as JSON, the classes of a run and the settings that its weights and statistics depend on."""
    config = run.giantdet
    classes = config.data.classes or Classes()
    return {
        **classes.model_dump(mode="json"),
        "model.type": config.model.type,
        "model.conventions": config.model.conventions,
        "model.backbone.name": config.model.backbone.name,
        "data.size": list(config.data.size),
        "data.short_side": config.data.short_side,
        "data.long_side": config.data.long_side,
        "norm": config.norm.model_dump(mode="json"),
    }


def refusal(saved: dict[str, Any], here: dict[str, Any]) -> str | None:
    """Return why a run cannot resume from what another has saved: the first difference, or None."""
    for key in _MUST_AGREE:
        before, now = saved.get(key), here.get(key)
        if key not in saved or before == now:
            continue
        if key in ("objects", "semantic"):
            return f"saved for other classes: {first_difference(_pairs(before), _pairs(now))}"
        return f"saved with giantdet.{key} {before}, and this run has {now}"
    return None


def changes(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return the settings that a run resumes with other values, as texts."""
    return [
        f"giantdet.{key} was {saved[key]} and is {now} now"
        for key, now in here.items()
        if key not in _MUST_AGREE and key in saved and saved[key] != now
    ]


def first_difference(before: tuple[Category, ...], now: tuple[Category, ...]) -> str:
    """Return the first class in which two lists differ, as a text."""
    for number in range(max(len(before), len(now))):
        old, new = (named(classes[number : number + 1]) for classes in (before, now))
        if old != new:
            return f"class {number} was {old} and is {new} now"
    return "none"


def named(found: tuple[Category, ...]) -> str:
    """Return a class with its id, or "missing"."""
    return f"{found[0][1]!r} (id {found[0][0]})" if found else "missing"


def _pairs(value: Any) -> tuple[Category, ...]:
    return tuple((int(number), str(name)) for number, name in value or ())
