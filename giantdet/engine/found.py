"""What a predictor finds in one image."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from giantdet.config.classes import Classes
from giantdet.data.dataset import Dataset
from giantdet.data.panoptic import PanopticMap
from giantdet.evaluation.rle import Rle, decode_mask


class Found(NamedTuple):
    """What was found in one image, in pixels of that image. A model without objects finds no detection.

    Masks are kept as COCO's compressed RLE: bitmaps of 100 objects take 18 GB in an image of a satellite.
    """

    boxes_D4: Tensor  # float32 xyxy, best first
    scores_D: Tensor  # float32
    labels_D: Tensor  # int64, class index
    names: list[str]  # by detection
    category_ids: list[int]  # by detection, of the training data set
    rles_D: list[Rle] | None = None  # masks, by detection
    semantic_HW: Tensor | None = None  # int64, number of a class in `ExportConfig.semantic_categories`
    panoptic: PanopticMap | None = None  # its segments' categories are the training data set's ids
    classes: Classes = Classes()  # all that the model knows
    size_hw: tuple[int, int] = (0, 0)  # of the image

    @property
    def masks_DHW(self) -> Tensor | None:
        """The masks as bitmaps, bool, D x h x w bytes, or None without masks; `mask` returns one of them."""
        if self.rles_D is None:
            return None
        if not self.rles_D:
            return torch.zeros(0, *self.size_hw, dtype=torch.bool)
        return torch.stack([self.mask(d) for d in range(len(self.rles_D))])

    def mask(self, d: int) -> Tensor:
        """Return the mask of detection d, bool `[h, w]`."""
        assert self.rles_D is not None
        return decode_mask(self.rles_D[d])

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Return the detections as COCO results."""
        results = []
        for d, (x0, y0, x1, y1) in enumerate(self.boxes_D4.tolist()):
            result: dict[str, Any] = {
                "image_id": image_id,
                "category_id": self.category_ids[d],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(self.scores_D[d]),
            }
            if self.rles_D is not None:
                result["segmentation"] = self.rles_D[d]
            results.append(result)
        return results


def truth_of(dataset: Dataset, i: int) -> Found:
    """Return the ground truth of image i, as if it had been found, with scores of 1.

    Crowd regions and ignored objects are left out. An object without a mask in a data set with masks gets its
    box as one. Raises DataError for a map that cannot be read.
    """
    objects, categories = dataset.objects(i), dataset.classes.objects
    labels = objects.labels_N.tolist()
    height, width = objects.size_hw
    semantic_HW = dataset.semantic_map(i)
    return Found(
        boxes_D4=torch.tensor(objects.boxes_N4.tolist(), dtype=torch.float32).view(-1, 4),
        scores_D=torch.ones(len(labels)),
        labels_D=torch.tensor(labels, dtype=torch.int64),
        names=[categories[label][1] for label in labels],
        category_ids=[categories[label][0] for label in labels],
        rles_D=[objects.rle(n) for n in range(len(labels))] if dataset.has_masks else None,
        semantic_HW=None if semantic_HW is None else torch.from_numpy(semantic_HW.astype("int64")),
        panoptic=dataset.panoptic_map(i),
        classes=dataset.classes,
        size_hw=(height, width),
    )
