"""How boxes, masks and semantic maps become a panoptic map."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from giantdet.config.section import Fraction, Section


class PanopticMergeConfig(Section):
    """When objects and stuff enter a panoptic map (Kirillov et al. 2019, section 4.1)."""

    score: Fraction = 0.5
    """Lowest score of an object. mmdetection: 0.6."""
    overlap: Fraction = 0.5
    """Share of an object that better ones may cover; beyond it, the object is left out."""
    stuff_area: Annotated[int, Field(ge=0)] = 4096
    """Smallest number of free pixels of a class of stuff, at the image's original size."""
