"""pycocotools' COCOeval, with objects to ignore and objects without a mask."""

from __future__ import annotations

from typing import Any

from pycocotools.cocoeval import COCOeval

from giantdet.data.truth import BOX_ONLY, NEUTRAL


class CocoJudge(COCOeval):  # type: ignore[misc]  # pycocotools has no types
    """COCOeval for a truth of `data/truth.py`; without such objects it is COCOeval.

    - An object with `ignore` 1 is neither found nor missed, and a detection of it is no false positive, as
      for objects outside a range of sizes. COCOeval overwrites `ignore` with `iscrowd`.
    - An object without a mask counts for boxes as any other. For masks it is a crowd region of its box's
      size: it is not missed, and detections inside its box are no false positives.
    """

    def _prepare(self) -> None:
        super()._prepare()
        as_crowd = BOX_ONLY if self.params.iouType == "segm" else None
        for key, truths in self._gts.items():
            self._gts[key] = [_as_judged(truth, as_crowd) for truth in truths]


def _as_judged(truth: dict[str, Any], as_crowd: str | None) -> dict[str, Any]:
    if as_crowd in truth:
        return truth | {"ignore": 1, "iscrowd": 1}
    return truth | {"ignore": 1} if NEUTRAL in truth else truth
