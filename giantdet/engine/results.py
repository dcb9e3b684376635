"""Write what was predicted for a list of images in the usual formats of each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from giantdet.config.classes import Classes
from giantdet.config.json_text import json_text
from giantdet.engine.found import Found
from giantdet.evaluation.panoptic import PanopticResult, panoptic_result, save_panoptic


class Results:
    """Results of `giantdet predict` in a folder, which is made.

    Detections are in results.json, as COCO results with the `file_name` of each image; semantic maps in
    semantic/, as PNG files of class numbers, with the classes in semantic.json; panoptic maps in
    panoptic.json and panoptic/, as COCO's panoptic results. Only the `tasks` of the model are written;
    `classes` are its own.
    """

    def __init__(self, folder: Path, tasks: Sequence[str], classes: Classes) -> None:
        self.folder, self.tasks, self.classes = folder, tasks, classes
        folder.mkdir(parents=True, exist_ok=True)
        self.detections: list[dict[str, Any]] = []
        self.panoptic: list[PanopticResult] = []
        self.images: list[dict[str, Any]] = []

    def add(self, number: int, path: Path, name: str, found: Found) -> str:
        """Add what was found in an image, and return it in words; `name` is unique among the images."""
        words = []
        if "box" in self.tasks:
            self.detections += [{"file_name": str(path), **result} for result in found.to_coco(number)]
            words.append(f"{len(found.names)} objects")
        if found.semantic_HW is not None:
            (self.folder / "semantic").mkdir(exist_ok=True)
            numbers_HW = found.semantic_HW.numpy().astype(np.uint8)
            Image.fromarray(numbers_HW).save(self.folder / "semantic" / f"{name}.png")
            words.append(f"{len(np.unique(numbers_HW))} semantic classes")
        if found.panoptic is not None:
            self.panoptic.append(panoptic_result(number, found.panoptic))
            words.append(f"{len(found.panoptic.segments)} segments")
        self.images.append({"id": number, "file_name": str(path)})
        return ", ".join(words)

    def write(self) -> list[Path]:
        """Write the files of all images, and return their paths."""
        files: list[Path] = []
        if "box" in self.tasks:
            files.append(self.folder / "results.json")
            files[-1].write_text(json_text(self.detections))
        if "semantic" in self.tasks:
            files.append(self.folder / "semantic.json")
            files[-1].write_text(
                json_text(
                    [
                        {"number": number, "id": category, "name": name}
                        for number, (category, name) in enumerate(self.classes.semantic)
                    ]
                )
            )
        if "panoptic" in self.tasks:
            save_panoptic(self.folder / "panoptic", self.panoptic, self.images)
            files.append(self.folder / "panoptic.json")
        return files
