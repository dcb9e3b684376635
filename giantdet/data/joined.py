"""Several data sets as one: a list of sections in `data.train` or `data.val`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from giantdet.config.classes import Category, Classes
from giantdet.data.panoptic import PanopticMap
from giantdet.data.reading import read_records
from giantdet.data.records import Instances, logger
from giantdet.data.summary import Summary
from giantdet.errors import DataError

if TYPE_CHECKING:
    from giantdet.data.dataset import Dataset, ImageObjects


class JoinedDataset:
    """The images of several data sets, one after the other, with the classes of the first.

    Args:
        parts: data sets of one kind (`check_kinds`), of any format.
        matched: for each part, the classes of the first with the part's own ids, as `meet` returns them.

    Image ids that an earlier part has are replaced by free ones; a warning counts them.
    Raises `DataError` where some parts have annotations and another is a list of images.
    """

    def __init__(self, parts: Sequence[Dataset], matched: Sequence[Classes]) -> None:
        first = parts[0]
        self.parts = parts
        more = f"{len(parts) - 1} more" if len(parts) > 2 else parts[-1].annotations
        self.annotations, self.root = Path(f"{first.annotations} and {more}"), first.root
        self.classes, self.protocol = first.classes, first.protocol
        self.has_masks = any(part.has_masks for part in parts)
        self.annotated = any(part.annotated for part in parts)
        for part in parts:
            if self.annotated and not part.annotated:
                part.training_indices(False)  # raises for a list of images, whose objects are unknown
        self.start = np.cumsum([0, *(len(part) for part in parts)])
        self.sizes_hw = np.concatenate([part.sizes_hw for part in parts])
        ids, renumbered = _unique([part.image_ids.tolist() for part in parts])
        self.image_ids = np.array(ids, np.int64)
        # Data without objects have no ids of their own, so that nobody looks for them in results.
        if renumbered and self.classes.objects:
            logger.warning(
                "%s: %d image ids occur in an earlier data set; renumbered", self.annotations, renumbered
            )
        self.labels = [_labels(p.classes, m) for p, m in zip(parts, matched, strict=True)]
        self.categories = [_categories(self.classes, m) for m in matched]
        self._warn_of_masks()

    def __len__(self) -> int:
        return int(self.start[-1])

    def _at(self, i: int) -> tuple[int, int]:
        """Return the part of image i, and the image's index in it."""
        p = int(np.searchsorted(self.start, i, side="right")) - 1
        return p, int(i - self.start[p])

    def path(self, i: int) -> Path:
        """See `Dataset.path`."""
        p, at = self._at(i)
        return self.parts[p].path(at)

    def read_image(self, i: int) -> NDArray[np.uint8]:
        """See `Dataset.read_image`."""
        p, at = self._at(i)
        return self.parts[p].read_image(at)

    def objects(self, i: int) -> ImageObjects:
        """See `Dataset.objects`; labels are those of the first part, ids the part's own."""
        p, at = self._at(i)
        found: Any = self.parts[p].objects(at)
        return cast("ImageObjects", replace(found, labels_N=self.labels[p][found.labels_N]))

    def ignored(self, i: int) -> list[dict[str, Any]]:
        """See `Dataset.ignored`."""
        p, at = self._at(i)
        return self.parts[p].ignored(at)

    def semantic_map(self, i: int) -> NDArray[np.uint8] | None:
        """See `Dataset.semantic_map`; `meet` has numbered the parts' classes as in the first."""
        p, at = self._at(i)
        return self.parts[p].semantic_map(at)

    def panoptic_map(self, i: int) -> PanopticMap | None:
        """See `Dataset.panoptic_map`; categories are those of the first part."""
        p, at = self._at(i)
        found = self.parts[p].panoptic_map(at)
        if found is None:
            return None
        ids = self.categories[p]
        return found._replace(segments=[s._replace(category=ids[s.category]) for s in found.segments])

    def number_as(self, semantic: tuple[Category, ...]) -> None:
        """See `Dataset.number_as`."""
        for part in self.parts:
            part.number_as(semantic)

    def training_indices(self, filter_empty: bool) -> NDArray[np.int64]:
        """See `Dataset.training_indices`."""
        found = [part.training_indices(filter_empty) for part in self.parts]
        return np.concatenate([at + start for at, start in zip(found, self.start[:-1], strict=True)])

    def _warn_of_masks(self) -> None:
        """Warn where whole parts have no masks; those of single objects are named by their part."""
        without = [part for part in self.parts if not part.has_masks and part.summary().objects]
        if without and self.has_masks:
            logger.warning(
                "%s: %d of %d objects have no mask, all those of %s among them; they are trained and scored "
                "as boxes only",
                *(self.annotations, self.summary().without_mask, self.summary().objects),
                without[0].annotations,
            )

    def summary(self) -> Summary:
        """Return the sums of the parts' numbers, by the class names of the first."""
        found = [part.summary() for part in self.parts]
        names = list(found[0].objects_per_class)
        per_class = dict.fromkeys(names, 0)
        by_size, left_out, otherwise = Counter[str](), Counter[str](), Counter[str]()
        for one, labels in zip(found, self.labels, strict=True):
            for label, count in zip(labels.tolist(), one.objects_per_class.values(), strict=True):
                per_class[names[label]] += count
            by_size.update(one.objects_by_size)
            left_out.update(one.left_out)
            otherwise.update(one.used_otherwise)
        sizes = [size for one in found for size in (one.smallest_image, one.largest_image) if size]
        sizes.sort(key=lambda size: (size[0] * size[1], size[::-1]))
        return Summary(
            images=sum(one.images for one in found),
            images_without_objects=sum(one.images_without_objects for one in found),
            objects=sum(one.objects for one in found),
            crowds=sum(one.crowds for one in found),
            ignored=sum(one.ignored for one in found),
            without_mask=sum(one.without_mask for one in found),
            tiny=sum(one.tiny for one in found),
            objects_per_class=per_class,
            objects_by_size=dict(by_size),
            smallest_image=sizes[0] if sizes else [],
            largest_image=sizes[-1] if sizes else [],
            left_out=dict(left_out),
            used_otherwise=dict(otherwise),
            images_by_part=tuple((str(part.annotations), len(part)) for part in self.parts),
        )

    def instances(self) -> Instances:
        """Return the usable records of all parts, with unique ids and the categories of the first."""
        # Names of files are relative to the folder of each part, so they need not be unique.
        images: list[dict[str, Any]] = []
        annotations: list[list[dict[str, Any]]] = []
        for p, part in enumerate(self.parts if self.classes.objects else ()):
            # An object of an unusable image must not become one of another part's image with the same id.
            records = read_records(part.annotations, part.instances())
            new = self.image_ids[self.start[p] : self.start[p + 1]].tolist()
            ids, categories = dict(zip(part.image_ids.tolist(), new, strict=True)), self.categories[p]
            images += [record | {"id": ids[number]} for number, record in records.images.items()]
            annotations.append(
                [
                    r | {"image_id": ids[r["image_id"]], "category_id": categories[r["category_id"]]}
                    for r in records.annotations
                ]
            )
        numbers, _ = _unique([[record.get("id") for record in part] for part in annotations])
        every = itertools.chain.from_iterable(annotations)
        return {
            "images": images,
            "annotations": [r | {"id": number} for r, number in zip(every, numbers, strict=True)],
            "categories": [{"id": number, "name": name} for number, name in self.classes.objects],
        }


def check_kinds(parts: Sequence[Dataset]) -> None:
    """Raise DataError unless all parts have the kinds of targets of the first: objects, semantic maps."""
    first = parts[0]
    for part in parts[1:]:
        for kind, what in (("objects", "objects"), ("semantic", "semantic maps")):
            here, there = bool(getattr(part.classes, kind)), bool(getattr(first.classes, kind))
            if here != there:
                one, other = (part, first) if here else (first, part)
                raise DataError(
                    f"{one.annotations} has {what} and {other.annotations} has none; data sets that are "
                    "joined need the same kinds of targets"
                )


def _labels(classes: Classes, matched: Classes) -> NDArray[np.int64]:
    """Return the first part's class index by the class index of a part."""
    index = {number: label for label, (number, _) in enumerate(matched.objects)}
    return np.array([index[number] for number, _ in classes.objects], np.int64)


def _categories(first: Classes, matched: Classes) -> dict[int, int]:
    """Return the first part's ids of objects and stuff by those of a part."""
    pairs = zip(first.stuff + first.objects, matched.stuff + matched.objects, strict=True)
    return {theirs: ours for (ours, _), (theirs, _) in pairs}


def _unique(parts: Sequence[Sequence[Any]]) -> tuple[list[int], int]:
    """Return the ids of all parts, new ones for those taken or not integers, and the count of new ones."""
    used = {number for part in parts for number in part if type(number) is int}
    free: Iterator[int] = (number for number in itertools.count(1) if number not in used)
    seen: set[int] = set()
    found: list[int] = []
    changed = 0
    for number in itertools.chain.from_iterable(parts):
        if type(number) is not int or number in seen:
            number = next(free)
            changed += 1
        seen.add(number)
        found.append(number)
    return found, changed
