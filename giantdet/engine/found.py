"""What a predictor finds in one image."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from giantdet.config.classes import Classes
from giantdet.data.dataset import Dataset
from giantdet.data.panoptic import PanopticMap
from giantdet.engine.draw import draw
from giantdet.engine.images import ImageLike, pixels_of
from giantdet.errors import InputError
from giantdet.evaluation.rle import Rle, decode_mask

if TYPE_CHECKING:
    import supervision


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
    image: ImageLike | None = None  # as it was given to the predictor, for `plot`

    def __repr__(self) -> str:
        """Return the classes and sizes in words; fields hold the values."""
        names = Counter(self.names)
        parts = [f"{len(self.names)} objects"] if self.names or self.classes.objects else []
        if names:
            parts[0] += f" ({', '.join(f'{count} {name}' for name, count in names.most_common())})"
        if self.semantic_HW is not None:
            parts.append("a semantic map")
        if self.panoptic is not None:
            parts.append(f"{len(self.panoptic.segments)} panoptic segments")
        height, width = self.size_hw
        return f"<Found: {', '.join(parts)} in {width} x {height} pixels>"

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

    def to_supervision(self) -> supervision.Detections:
        """Return the detections as `supervision.Detections`, with names in `data["class_name"]`.

        Masks are bitmaps, h x w bytes each. Raises InputError, a ValueError, without the package.
        """
        try:
            import supervision
        except ImportError as error:
            raise InputError('to_supervision needs a package: pip install "giantdet[supervision]"') from error
        masks_DHW = self.masks_DHW
        return supervision.Detections(
            xyxy=self.boxes_D4.numpy(),
            mask=None if masks_DHW is None else masks_DHW.numpy(),
            confidence=self.scores_D.numpy(),
            class_id=self.labels_D.numpy(),
            data={"class_name": np.array(self.names)},
        )

    def plot(self, image: ImageLike | None = None) -> Image.Image:
        """Return a picture of what was found, on the image that the predictor was given, or on another.

        That image is not copied: an array or file that has changed since is drawn as it is now. Raises
        InputError, a ValueError, where there is none.
        """
        image = self.image if image is None else image
        if image is None:
            raise InputError("this result has no image to draw on: give one, plot(image)")
        if hasattr(image, "seek") and not isinstance(image, Image.Image):
            image.seek(0)
        return draw(pixels_of(image), self)

    def save(self, path: str | Path, image: ImageLike | None = None) -> None:
        """Write the picture of `plot` to a file, whose ending names the format."""
        self.plot(image).save(Path(path).expanduser())


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
