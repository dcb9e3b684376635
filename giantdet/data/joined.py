"""Several data sets as one: `data.train` or `data.val` is a list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantdet.config.classes import Category
from giantdet.data.dataset import Dataset, ImageObjects, meet
from giantdet.data.panoptic import PanopticMap
from giantdet.data.reading import read_records
from giantdet.data.records import Instances, logger
from giantdet.data.summary import Summary
from giantdet.errors import DataError


@dataclass(frozen=True)
class _Relabelled:
    """The objects of an image of a part, with the class indices of the whole."""

    objects: ImageObjects
    labels_N: NDArray[np.int64]

    @property
    def boxes_N4(self) -> NDArray[np.float32]:
        return self.objects.boxes_N4

    @property
    def ids_N(self) -> NDArray[np.int64]:
        return self.objects.ids_N

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.objects.size_hw

    def __len__(self) -> int:
        return len(self.objects)

    def has_mask(self, n: int) -> bool:
        return self.objects.has_mask(n)

    def rle(self, n: int) -> dict[str, Any]:
        return self.objects.rle(n)


class JoinedDataset:
    """The images of several data sets, one after the other; see `Dataset` for the methods.

    The classes are those of the first part, which the others meet by name: they need not have all of them,
    and other ids are mapped, with a warning. Where two images have the same id, all images are numbered from
    1. Raises DataError for a name that the first part does not have, and where parts differ in the kind of
    their targets.
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts, first = list(parts), parts[0]
        self.annotations, self.classes, self.root = first.annotations, first.classes, first.root
        self.ids: list[dict[int, int]] = []  # by part: the first's category id for each of its own
        self.labels: list[NDArray[np.int64]] = []  # by part: the class index for each of its own
        for part in self.parts:
            for kind in ("objects", "semantic"):
                if bool(getattr(part.classes, kind)) != bool(getattr(self.classes, kind)):
                    raise DataError(
                        f"{part.annotations} and {first.annotations} cannot be joined: only one of them has "
                        f"classes of {kind}"
                    )
            matched = part.classes if part is first else meet(part, self.classes, first.annotations)
            index = {theirs: n for n, (theirs, _) in enumerate(matched.objects)}
            self.labels.append(np.array([index[own] for own, _ in part.classes.objects], np.int64))
            pairs = [*zip(matched.objects, self.classes.objects, strict=True)]
            pairs += zip(matched.semantic, self.classes.semantic, strict=True)
            self.ids.append({theirs: ours for (theirs, _), (ours, _) in pairs})
        self.start = np.cumsum([0, *map(len, self.parts)])
        self.sizes_hw = np.concatenate([part.sizes_hw for part in self.parts])
        self.image_ids = np.concatenate([part.image_ids for part in self.parts])
        if clashes := len(self.image_ids) - len(np.unique(self.image_ids)):
            self.image_ids = np.arange(1, len(self.image_ids) + 1)
            logger.warning(
                "%s and %d more: %d images have the id of another one, so all are numbered from 1",
                *(self.annotations, len(self.parts) - 1, clashes),
            )
        self.has_masks = any(part.has_masks for part in self.parts)
        self.annotated = all(part.annotated for part in self.parts)

    def __len__(self) -> int:
        return len(self.image_ids)

    def _at(self, i: int) -> tuple[int, int]:
        """Return the number of the part that image i is in, and its index there."""
        part = int(np.searchsorted(self.start, i, side="right")) - 1
        return part, i - int(self.start[part])

    def path(self, i: int) -> Path:
        part, i = self._at(i)
        return self.parts[part].path(i)

    def read_image(self, i: int) -> NDArray[np.uint8]:
        part, i = self._at(i)
        return self.parts[part].read_image(i)

    def objects(self, i: int) -> ImageObjects:
        part, i = self._at(i)
        found = self.parts[part].objects(i)
        return _Relabelled(found, self.labels[part][found.labels_N])

    def semantic_map(self, i: int) -> NDArray[np.uint8] | None:
        part, i = self._at(i)
        return self.parts[part].semantic_map(i)

    def panoptic_map(self, i: int) -> PanopticMap | None:
        part, i = self._at(i)
        found = self.parts[part].panoptic_map(i)
        if found is None:
            return None
        ids = self.ids[part]
        return found._replace(segments=[s._replace(category=ids[s.category]) for s in found.segments])

    def number_as(self, semantic: tuple[Category, ...]) -> None:
        for part in self.parts:
            part.number_as(semantic)

    def training_indices(self, filter_empty: bool) -> NDArray[np.int64]:
        found = [part.training_indices(filter_empty) for part in self.parts]
        return np.concatenate([indices + first for indices, first in zip(found, self.start, strict=False)])

    def summary(self) -> Summary:
        """Return the sums over the parts."""
        found = [vars(part.summary()) for part in self.parts]
        total: dict[str, Any] = {}
        for name, value in found[0].items():
            if isinstance(value, dict):
                counts: Counter[str] = Counter(dict.fromkeys(value, 0))
                for numbers in found:
                    counts.update(numbers[name])
                total[name] = dict(counts)
            else:
                total[name] = sum(numbers[name] for numbers in found)
        return Summary(**total)

    def instances(self) -> Instances:
        """Return the usable records of all parts; objects are numbered from 1."""
        images: list[Any] = []
        annotations: list[Any] = []
        for n, part in enumerate(self.parts):
            own = self.image_ids[self.start[n] : self.start[n + 1]]
            number = dict(zip(part.image_ids.tolist(), own.tolist(), strict=True))
            records = read_records(part.annotations, part.instances())
            images += [record | {"id": number[i]} for i, record in records.images.items()]
            annotations += [
                record
                | {
                    "id": len(annotations) + k,
                    "image_id": number[record["image_id"]],
                    "category_id": self.ids[n][record["category_id"]],
                }
                for k, record in enumerate(records.annotations, 1)
            ]
        categories = [{"id": number, "name": name} for number, name in self.classes.objects]
        return {"images": images, "categories": categories, "annotations": annotations}
