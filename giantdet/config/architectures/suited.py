"""Values of a model's section that suit a data set, for `giantdet new`, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

SMALL_SIDE = 25.0
"""Pixels on the canvas below which objects need anchors from 16 pixels on (docs/real-data.md)."""
_SMALL_ANCHORS = [16, 32, 64, 128, 256]
_ANCHORS = [32, 64, 128, 256, 512]


class Suited(NamedTuple):
    """A value and why it is chosen."""

    value: Any
    why: str


class Facts(NamedTuple):
    """What a model's section depends on of a data set."""

    side: float
    """Median of the objects' sides, the root of their boxes' area, in pixels of the canvas."""
    has_masks: bool
    most_objects: int
    """The largest number of objects in an image."""


def anchors(facts: Facts) -> Suited:
    """Return the sides of the anchors.

    On 160 photographs whose objects are larger, anchors from 16 pixels cost 0.046 box AP
    (docs/real-data.md): a quarter as many match an object.
    """
    if facts.side < SMALL_SIDE:
        return Suited(_SMALL_ANCHORS, f"half of the objects are under {SMALL_SIDE:g} pixels on the canvas")
    return Suited(_ANCHORS, f"the objects' median side is {facts.side:.0f} pixels on the canvas")


def detections(facts: Facts) -> Suited | None:
    """Return the number of detections per image, or None for the default of 100."""
    if facts.most_objects <= 100:
        return None
    return Suited(_rounded(facts.most_objects), f"an image has {facts.most_objects} objects")


def _rounded(objects: int) -> int:
    """Return a number of slots for so many objects, with room for some more."""
    return min(-(-objects * 5 // 4) // 50 * 50 + 50, 1000)


def slots(facts: Facts) -> Suited | None:
    """Return the number of objects per image in a batch, or None for the default of 100."""
    if facts.most_objects <= 100:
        return None
    value = min(_rounded(facts.most_objects), 500)
    left = "" if value >= facts.most_objects else "; the largest are trained in images with more"
    return Suited(value, f"an image has {facts.most_objects} objects{left}")


def _two_stage(facts: Facts) -> dict[str, Suited | None]:
    head = None if facts.has_masks else Suited(False, "the data have no masks: Faster R-CNN, boxes alone")
    return {
        "rpn.anchor_sizes": anchors(facts),
        "box_head.detections": detections(facts),
        "mask_head.enabled": head,
    }


def _one_stage(facts: Facts) -> dict[str, Suited | None]:
    return {"head.anchor_sizes": anchors(facts), "head.detections": detections(facts)}


SUITED: dict[str, Callable[[Facts], dict[str, Suited | None]]] = {
    "mask_rcnn": _two_stage,
    "cascade_mask_rcnn": _two_stage,
    "retinanet": _one_stage,
}
"""What suits a data set of objects, by architecture: values by their path in the section."""
