"""The summary of a data set in numbers, printed at the start of a run and by `giantdet validate-data`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from giantdet.data.reading import Records
from giantdet.data.transforms import MIN_SIDE

_NAMED = 20  # classes named in the text; the JSON has all


@dataclass(frozen=True)
class Summary:
    """Numbers of a data set. Crowd regions and ignored objects are not among the objects."""

    images: int
    images_without_objects: int = 0
    objects: int = 0
    crowds: int = 0
    ignored: int = 0
    without_mask: int = 0
    tiny: int = 0
    """Objects narrower than a pixel of the file."""
    objects_per_class: dict[str, int] = field(default_factory=dict)
    objects_by_size: dict[str, int] = field(default_factory=dict)
    """Objects by the area of their boxes: small below 32 x 32 pixels, large from
    96 x 96 on (COCO's limits)."""
    smallest_image: list[int] = field(default_factory=list)
    """Width and height of the image with the fewest pixels."""
    largest_image: list[int] = field(default_factory=list)
    """Width and height of the image with the most pixels."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Records that could not be used, by kind."""
    used_otherwise: dict[str, int] = field(default_factory=dict)
    """Records that were used, but not as they are written, by kind."""
    images_by_part: tuple[tuple[str, int], ...] = ()
    """For several data sets as one: the file or folder of each, and its number of images."""

    @property
    def empty_classes(self) -> list[str]:
        """Names of the classes without objects."""
        return [name for name, count in self.objects_per_class.items() if not count]

    def as_json(self) -> dict[str, Any]:
        """Return all numbers, for a JSON file."""
        return asdict(self) | {"classes_without_objects": self.empty_classes}

    def text(self, title: str) -> str:
        """Return the summary as lines of text, the first of which begins with `title`."""
        lines = [f"{title}: {self.images} images"]
        parts = [f"  {name}: {images} images" for name, images in self.images_by_part]
        if self.objects_per_class:
            lines[0] += f" ({self.images_without_objects} without objects), {self.objects} objects"
            numbers = {
                "crowd regions": self.crowds,
                "ignored objects": self.ignored,
                "objects without a mask": self.without_mask,
                "objects narrower than a pixel": self.tiny,
            }
            lines.append("  " + ", ".join(f"{name}: {count}" for name, count in numbers.items()))
            lines.append(f"  objects per class: {_counts(self.objects_per_class)}")
            by_size = ", ".join(f"{count} {name}" for name, count in self.objects_by_size.items())
            lines.append(f"  objects by size: {by_size}")
        if self.objects and self.empty_classes:
            lines.append(f"  classes without objects: {_listed(self.empty_classes)}")
        if self.smallest_image:
            sizes = (self.smallest_image, self.largest_image)
            ends = dict.fromkeys(f"{width} x {height}" for width, height in sizes)
            lines.append(f"  images of {' to '.join(ends)} pixels")
        for name, kinds in (("left out", self.left_out), ("used, not as written", self.used_otherwise)):
            if kinds:
                lines.append(f"  {name}: " + ", ".join(f"{kind} {count}" for kind, count in kinds.items()))
        return "\n".join([*lines, *parts])


def summarize(records: Records) -> Summary:
    """Return the summary of the usable records of a file."""
    objects, crowds, ignored, without_mask, tiny = Counter[int](), 0, 0, 0, 0
    images: set[int] = set()
    by_size = dict.fromkeys(("small", "medium", "large"), 0)
    for record in records.annotations:
        if record.get("iscrowd"):
            crowds += 1
        elif record.get("ignore"):
            ignored += 1
        else:
            objects[record["category_id"]] += 1
            images.add(record["image_id"])
            without_mask += not record.get("segmentation")
            width, height = record["bbox"][2:]
            tiny += min(width, height) < MIN_SIDE
            by_size[_size_name(width * height)] += 1
    per_class: dict[str, int] = {}
    for number, name in sorted(records.categories.items()):
        per_class[f"{name} ({number})" if name in per_class else name] = objects[number]
    sizes = sorted(records.sizes.values(), key=lambda size: (size[0] * size[1], size))
    return Summary(
        images=len(records.images),
        images_without_objects=len(records.images) - len(images),
        objects=objects.total(),
        crowds=crowds,
        ignored=ignored,
        without_mask=without_mask,
        tiny=tiny,
        objects_per_class=per_class,
        objects_by_size=by_size,
        smallest_image=list(sizes[0][::-1]) if sizes else [],
        largest_image=list(sizes[-1][::-1]) if sizes else [],
        left_out=dict(records.skipped),
        used_otherwise=dict(records.noted),
    )


def _size_name(area: float) -> str:
    return "small" if area < 32**2 else "medium" if area < 96**2 else "large"


def _counts(per_class: dict[str, int]) -> str:
    ordered = sorted(per_class.items(), key=lambda item: -item[1])
    return _listed([f"{name} {count}" for name, count in ordered])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
