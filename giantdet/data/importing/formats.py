"""The formats that `giantdet import-data` reads, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from giantdet.data.importing.coco import read_coco
from giantdet.data.importing.cvat import read_cvat
from giantdet.data.importing.label_studio import read_label_studio
from giantdet.data.importing.labelme import read_labelme
from giantdet.data.importing.masks import read_masks
from giantdet.data.importing.open_images import read_open_images
from giantdet.data.importing.scene import Notes, Picture, Request
from giantdet.data.importing.via import read_via
from giantdet.data.importing.voc import read_voc
from giantdet.data.importing.yolo import read_yolo

FORMATS: dict[str, Callable[[Request, Notes], Iterator[Picture]]] = {
    "voc": read_voc,
    "yolo": read_yolo,
    "labelme": read_labelme,
    "via": read_via,
    "cvat": read_cvat,
    "label-studio": read_label_studio,
    "open-images": read_open_images,
    "masks": read_masks,
    "coco": read_coco,
}
"""How each format is read; `recognise.py` has how it is recognised and called."""
