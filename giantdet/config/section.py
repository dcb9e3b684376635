"""The base of all sections of a run's JSON, and the types that their fields share."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from giantdet.config.lengths import LENGTH_PATTERN, LENGTH_WORDS, is_length

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(gt=0)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""The path of a file or folder; a leading ~ is the home folder, which no shell replaces in a JSON."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0.0)]


def wish(text: str) -> PydanticCustomError:
    """Return the error for a field's validator; the message to the user is "PATH must be TEXT, got VALUE"."""
    return PydanticCustomError("wish", text.replace("{", "{{").replace("}", "}}"))


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # JSON's integers have no limit, but batches and steps are divided as floats.
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise wish("an integer")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
"""An integer, also written as a float without a fraction, such as 5e8."""


def _length(value: Any) -> int | str:
    if not is_length(value) or (not isinstance(value, str) and value < 0):
        raise wish(LENGTH_WORDS)
    return value if isinstance(value, str) else int(value)


def _period(value: int | str) -> int | str:
    if value == 0:
        raise wish("at least 1 step")
    return value


_LENGTH_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": LENGTH_PATTERN}]
}
Length = Annotated[int | str, BeforeValidator(_length), WithJsonSchema(_LENGTH_SCHEMA)]
"""Steps, or a text like "2 epochs" or "90000 images" (config/lengths.py)."""
Period = Annotated[
    int | str,
    BeforeValidator(lambda value: _period(_length(value))),
    WithJsonSchema(_LENGTH_SCHEMA),
]
"""A length that is not 0, because something is divided by it."""


class Section(BaseModel):
    """Base of all sections: they are immutable, unknown keys are errors, and defaults are validated too."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    def given(self) -> dict[str, Any]:
        """Return the values that were given, without defaults, for JSON."""
        return self.model_dump(mode="json", exclude_unset=True)


LISTS = "list"
"""The tag of a list of sections in a union."""


def tagged_union(known: Mapping[str, type[Section]], key: str, default: str, lists: Any = None) -> Any:
    """Return the union of sections, one of which is chosen by the value of `key`, or by `default` without.

    `lists`, if given, is the type of a list of sections, which may be given instead of one.
    """

    def tag_of(section: Any) -> Any:
        """Return the name of a JSON object or of a section."""
        if lists is not None and isinstance(section, list | tuple):
            return LISTS
        return section.get(key, default) if isinstance(section, dict) else getattr(section, key, default)

    union: Any = None
    for name, section in known.items():
        member = Annotated[section, Tag(name)]  # type: ignore[valid-type]
        union = member if union is None else union | member
    if lists is not None:
        union = union | Annotated[lists, Tag(LISTS)]
    return Annotated[union, Discriminator(tag_of)]
