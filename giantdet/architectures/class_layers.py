"""Layers whose rows belong to classes, and how another model's rows are taken over by the classes' names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from giantdet.config.class_names import same_classes
from giantdet.config.classes import Category, ClassKind


class ClassLayer(NamedTuple):
    """A weight and a bias of `blocks` x (`before` + classes x `values` + `after`) rows."""

    prefix: str
    """Prefix of the names of both parameters."""
    kind: ClassKind = "objects"
    values: int = 1
    """Number of consecutive rows of a class."""
    before: int = 0
    """Number of rows before those of the classes: the class "things"."""
    after: int = 0
    """Number of rows after those of the classes: the background."""
    blocks: int = 1
    """Number of repetitions of all this: the anchors of a cell."""


class Transfer(NamedTuple):
    """Which classes of a model take over the rows of another's."""

    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    others: tuple[int | None, ...]
    """For each class of the model, the other's class of the same name."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Names of classes that the other model has under a second name, and that name."""


def transfer(old: Sequence[Category], new: Sequence[Category]) -> Transfer:
    """Return how the classes `new` are taken over from `old`, by name (`config/class_names.py`)."""
    there, here = [name for _, name in old], [name for _, name in new]
    others = same_classes(there, here)
    pairs = [(name, None if n is None else there[n]) for name, n in zip(here, others, strict=True)]
    return Transfer(
        taken=tuple(name for name, other in pairs if other is not None),
        fresh=tuple(name for name, other in pairs if other is None),
        others=tuple(others),
        renamed=tuple((name, other) for name, other in pairs if other is not None and other != name),
    )


def rows_by_name(layer: ClassLayer, old: Tensor, new: Tensor, others: Sequence[int | None]) -> Tensor:
    """Return `new` with the rows of `old` for the classes in `others`, and for background and things.

    `others` may be shorter than the classes of the model, which keeps the rows of the rest. Where the layers
    differ in more than their classes, `old` is returned, for an error of those who load it.
    """
    if old.shape[1:] != new.shape[1:] or len(old) % layer.blocks:
        return old
    taken, source = _blocks(layer, new).clone(), _blocks(layer, old)
    first, values = layer.before, layer.values
    taken[:, :first] = source[:, :first]
    if layer.after:
        taken[:, -layer.after :] = source[:, -layer.after :]
    for number, other in enumerate(others):
        if other is not None:
            here, there = first + number * values, first + other * values
            taken[:, here : here + values] = source[:, there : there + values]
    return taken.reshape(new.shape)


def _blocks(layer: ClassLayer, rows: Tensor) -> Tensor:
    return rows.reshape(layer.blocks, -1, *rows.shape[1:])
