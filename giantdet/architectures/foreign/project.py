"""What giantdet knows of another project whose weights it reads: names, order of values, and settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from giantdet.errors import InputError

State = Mapping[str, Tensor]
Replacement = str | Callable[[re.Match[str]], str]

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of the channels red, green, blue, on the scale 0 to 255."""


class Settings(NamedTuple):
    """What the tensors of a file do not tell, or tell only to those who know the project."""

    section: dict[str, Any]
    """Keys of the `model` section, beside those that `sections.py` reads from names and shapes."""
    bgr: bool = False
    """The first layer takes the channels as blue, green, red; giantdet's images are red, green, blue."""
    affine_norm: Literal["group", "layer"] = "group"
    """The norm of pyramid and heads where it has no running statistics: shapes do not tell them apart."""
    assumed: str = ""
    """What the file does not tell, for the report."""
    note: str = ""
    """What else the user must know, for the report."""
    canvas: int | None = None
    """Side in pixels of the square canvas, where only tensors that are left out tell it."""
    untold: tuple[str, ...] = ()
    """Keys of config.json that the file should tell and does not: the user must."""
    problem: str = ""
    """Why giantdet's model would not compute what theirs does."""

    def of_backbone(self, section: Mapping[str, Any], **others: Any) -> Settings:
        """Return these settings with further keys of the `backbone` section, and with other fields."""
        backbone = {**self.section.get("backbone", {}), **section}
        return self._replace(section=self.section | {"backbone": backbone}, **others)


class Converted(NamedTuple):
    """The tensors of a file under giantdet's names."""

    state: dict[str, Tensor]
    names: dict[str, str]
    """giantdet's name of each of their keys, the left out ones excepted."""
    left: dict[str, str]
    """Why a key is left out."""
    settings: Settings


@dataclass(frozen=True)
class Project:
    """A project whose files of weights are read."""

    title: str
    recognises: Callable[[Collection[str]], bool]
    """Whether the keys are those of a model of the project."""
    names: Callable[[Collection[str]], dict[str, str]]
    """giantdet's name of each key; unknown keys keep theirs, and do not match any parameter."""
    settings: Callable[[State], Settings]
    """Settings of the model, by its tensors under their own names."""
    values: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state
    """The tensors under giantdet's names with the values in giantdet's order."""
    unused: tuple[tuple[str, str], ...] = ()
    """(pattern of keys, why they are left out)."""

    def convert(self, state: State, bgr: bool | None = None) -> Converted:
        """Return the tensors in giantdet's terms. `bgr` replaces what the settings say of the channels.

        Raises InputError for a model that giantdet does not have, where names or settings tell.
        """
        left = {key: why for key in state for pattern, why in self.unused if re.search(pattern, key)}
        names = {key: name for key, name in self.names(state).items() if key not in left}
        taken: dict[str, str] = {}
        for key, name in names.items():
            if taken.setdefault(name, key) != key:
                raise InputError(f"{taken[name]} and {key} are one tensor in giantdet, {name}")
        settings = self.settings(state)
        if bgr is not None:
            settings = settings._replace(bgr=bgr)
        converted = self.values({name: state[key] for key, name in names.items()})
        if settings.bgr:
            for first in FIRST_LAYERS:
                if first in converted:
                    converted[first] = converted[first].flip(1)
        return Converted(converted, names, left, settings)


FIRST_LAYERS = tuple(f"backbone.body.{name}.weight" for name in ("conv1", "conv1.0", "patch_embed.proj"))


def renamed(key: str, rules: Iterable[tuple[str, Replacement]]) -> str:
    """Return the key with each pattern replaced, in this order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def numbers(keys: Iterable[str], pattern: str) -> list[int]:
    """Return the numbers that the pattern's group has in the keys, in rising order."""
    return sorted({int(found[1]) for key in keys if (found := re.match(pattern, key)) is not None})
