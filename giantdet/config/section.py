"""The base of all sections of a run's JSON, and the types that their fields share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from giantdet.config.lengths import LENGTH_PATTERN

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Length = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=LENGTH_PATTERN)]
"""Steps, or a text like "2 epochs" or "90000 images" (config/lengths.py)."""


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are errors, defaults are checked too."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )
