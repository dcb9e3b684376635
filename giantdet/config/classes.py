"""The identity of a data set's classes: what runs, exports and predictions call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from giantdet.config.section import Section

ClassKind = Literal["objects", "semantic", "stuff"]
"""Attributes of `Classes`."""
Category = tuple[int, str]
"""The data set's id of a class, and its name."""


def unique_names(categories: Sequence[Category]) -> list[str]:
    """Return the names of classes; the id is appended to a name that an earlier class has.

    Two of ADE20K's 150 classes are a "screen".
    """
    found: dict[str, int] = {}
    for number, name in categories:
        found[f"{name} ({number})" if name in found else name] = number
    return list(found)


def positions(classes: Sequence[Category], among: Sequence[Category]) -> list[int]:
    """Return where each class is in `among`: the one of its id and name, or else the first of its name.

    Names alone do not tell apart two classes of one name. Raises KeyError for a name that is not there.
    """
    by_name: dict[str, int] = {}
    for number, (_, name) in enumerate(among):
        by_name.setdefault(name, number)
    by_pair = {category: number for number, category in enumerate(among)}
    return [by_pair[category] if category in by_pair else by_name[category[1]] for category in classes]


class Classes(Section):
    """Classes of objects and of semantic maps. A class of either may be missing from the images."""

    objects: tuple[Category, ...] = ()
    """By class index of boxes and masks."""
    semantic: tuple[Category, ...] = ()
    """By number in the semantic maps. For panoptic data, 0 stands for all objects ("things"), and the others
    are the classes of stuff."""

    @classmethod
    def numbered(cls, objects: int, semantic: int = 0) -> Classes:
        """Return as many classes without real names, for plans and tests."""

        def some(count: int) -> tuple[Category, ...]:
            return tuple((number, str(number)) for number in range(count))

        return cls(objects=some(objects), semantic=some(semantic))

    @property
    def object_ids(self) -> list[int]:
        """The data set's ids of the classes of objects."""
        return [number for number, _ in self.objects]

    @property
    def stuff(self) -> tuple[Category, ...]:
        """The classes of stuff of panoptic data."""
        return self.semantic[1:]
