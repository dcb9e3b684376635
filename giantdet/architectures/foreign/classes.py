"""Names and ids of the classes of usual data sets, by their number, for files of weights without names."""

from __future__ import annotations

from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from giantdet.config.architectures import ArchitectureConfig
from giantdet.config.class_names import PUBLISHED, published
from giantdet.config.classes import Category, Classes, unique_names
from giantdet.errors import InputError

THINGS: Category = (0, "things")
_MISSING = "N/A"  # torchvision's name for the ids that COCO does not use

_STUFF = (
    *((92, "banner"), (93, "blanket"), (95, "bridge"), (100, "cardboard"), (107, "counter")),
    *((109, "curtain"), (112, "door-stuff"), (118, "floor-wood"), (119, "flower"), (122, "fruit")),
    *((125, "gravel"), (128, "house"), (130, "light"), (133, "mirror-stuff"), (138, "net")),
    *((141, "pillow"), (144, "platform"), (145, "playingfield"), (147, "railroad"), (148, "river")),
    *((149, "road"), (151, "roof"), (154, "sand"), (155, "sea"), (156, "shelf"), (159, "snow")),
    *((161, "stairs"), (166, "tent"), (168, "towel"), (171, "wall-brick"), (175, "wall-stone")),
    *((176, "wall-tile"), (177, "wall-wood"), (178, "water-other"), (180, "window-blind")),
    *((181, "window-other"), (184, "tree-merged"), (185, "fence-merged"), (186, "ceiling-merged")),
    *((187, "sky-other-merged"), (188, "cabinet-merged"), (189, "table-merged")),
    *((190, "floor-other-merged"), (191, "pavement-merged"), (192, "mountain-merged")),
    *((193, "grass-merged"), (194, "dirt-merged"), (195, "paper-merged"), (196, "food-other-merged")),
    *((197, "building-other-merged"), (198, "rock-merged"), (199, "wall-other-merged"), (200, "rug-merged")),
)
_CITYSCAPES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle"),
    "bicycle",
)


def _coco() -> tuple[Category, ...]:
    """Return COCO's ids from 0 to 90 with their names; unused ones have names of their own."""
    named = list(enumerate(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]))
    return tuple(zip(range(len(named)), unique_names(named), strict=True))


def usual_classes(config: ArchitectureConfig) -> Classes | None:
    """Return the classes of COCO, Cityscapes, Objects365 or LVIS where a model has as many; else None."""
    every = _coco()
    coco = tuple(c for c in every[1:] if not c[1].startswith(_MISSING))
    known: dict[str, dict[int, tuple[Category, ...]]] = {
        # torchvision's models have a class for each id, and its RetinaNet one for 0, too.
        "objects": {
            **{len(classes): classes for classes in map(published, PUBLISHED)},
            **{len(coco): coco, len(every) - 1: every[1:], len(every): every},
        },
        "stuff": {len(_STUFF): (THINGS, *_STUFF)},
        "semantic": {
            len(_STUFF) + 1: (THINGS, *_STUFF),
            len(coco) + len(_STUFF): (*coco, *_STUFF),
            len(_CITYSCAPES): tuple(enumerate(_CITYSCAPES)),
        },
    }
    found: dict[str, tuple[Category, ...]] = {}
    for key, kind in config.class_keys.items():
        classes = known[kind].get(getattr(config, key))
        if classes is None:
            return None
        found["semantic" if kind == "stuff" else kind] = classes
    return Classes(**found)


def named_classes(config: ArchitectureConfig, things: list[Category], stuff: list[Category]) -> Classes:
    """Return the classes with given names; `stuff` are those of panoptic data.

    Raises InputError where there are not as many as the model has.
    """
    found: dict[str, tuple[Category, ...]] = {}
    for key, kind in config.class_keys.items():
        chosen = {"objects": things, "stuff": stuff, "semantic": [*things, *stuff]}[kind]
        wanted = getattr(config, key)
        if len(chosen) != wanted:
            raise InputError(f"--classes has {len(chosen)} classes, the model has {wanted} ({key})")
        found["semantic" if kind == "stuff" else kind] = (*([THINGS] if kind == "stuff" else []), *chosen)
    return Classes(**found)
