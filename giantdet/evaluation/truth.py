"""The true maps of a data set by image id, and which of them were not scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from giantdet.data.dataset import Dataset
from giantdet.data.records import logger
from giantdet.distributed import comm
from giantdet.errors import DataError


class Truth:
    """Semantic or panoptic maps; those that cannot be read are named in a warning and are not scored."""

    def __init__(self, dataset: Dataset, kind: Literal["semantic", "panoptic"]) -> None:
        self.dataset = dataset
        self.read = dataset.semantic_map if kind == "semantic" else dataset.panoptic_map
        self.index = {int(image_id): i for i, image_id in enumerate(dataset.image_ids)}
        self.seen: set[int] = set()

    def path(self, image_id: int) -> Path:
        """Return the file of an image."""
        return self.dataset.path(self.index[image_id])

    def of(self, image_id: int) -> Any:
        """Return the map of an image, or None for an empty slot, without maps, and if it cannot be read."""
        if image_id < 0:
            return None
        self.seen.add(image_id)
        try:
            return self.read(self.index[image_id])
        except DataError as error:
            logger.warning("not scored: %s", error)
            return None

    def missed(self) -> Iterator[tuple[int, Any]]:
        """Yield, on the main rank, the maps of images that no rank has asked for. All ranks call it.

        These are images that cannot be read. Their truth counts as missed.
        """
        seen = {image_id for part in comm.gather_objects(sorted(self.seen)) for image_id in part}
        if comm.is_main():
            for image_id in sorted(set(self.index) - seen):
                if (truth := self.of(image_id)) is not None:
                    yield image_id, truth
