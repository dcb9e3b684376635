"""Weights of other projects under giantdet's names, and the `model` section that they need.

A project is one file with its names, and one line in `PROJECTS`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from torch import Tensor

from giantdet.architectures.base import Architecture
from giantdet.architectures.foreign.classes import usual_classes
from giantdet.architectures.foreign.detectron2 import DETECTRON2
from giantdet.architectures.foreign.eva02 import EVA02
from giantdet.architectures.foreign.mmdetection import MMDETECTION
from giantdet.architectures.foreign.mmsegmentation import MMSEGMENTATION
from giantdet.architectures.foreign.pe import PE
from giantdet.architectures.foreign.project import Converted, Project
from giantdet.architectures.foreign.sections import section_of
from giantdet.architectures.foreign.torchvision import TORCHVISION
from giantdet.config.architectures import SECTIONS
from giantdet.config.architectures.common import ArchitectureConfig
from giantdet.config.classes import Classes
from giantdet.errors import InputError
from giantdet.layers.plain_vit import global_block_indices

__all__ = ["PROJECTS", "Converted", "Project", "classes_of", "from_project", "project_of", "translate"]

_log = logging.getLogger(__name__)

# EVA-02's and PE's detectors have detectron2's heads: they are looked for before it.
PROJECTS: tuple[Project, ...] = (TORCHVISION, EVA02, PE, DETECTRON2, MMSEGMENTATION, MMDETECTION)


def project_of(keys: Collection[str]) -> Project | None:
    """Return the project whose model has these keys; None for giantdet's own and unknown ones."""
    return next((project for project in PROJECTS if project.recognises(keys)), None)


def translate(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the weights of another project under giantdet's names, and others unchanged."""
    project = project_of(state)
    return state if project is None else project.convert(state).state


def from_project(
    state: Mapping[str, Tensor], model: Architecture, config: ArchitectureConfig, what: str
) -> Mapping[str, Tensor]:
    """Return the weights of another project as the state of `model` of `config`, and others unchanged.

    What is left out is logged, and a warning names each setting of the model that differs from those that
    the weights were trained with.
    """
    project = project_of(state)
    if project is None:
        return state
    try:
        converted = project.convert(state)
    except InputError as error:
        raise InputError(f"{what}: weights of {project.title}, but {error}") from None
    if problem := converted.settings.problem:
        raise InputError(f"{what}: weights of {project.title}, but {problem}")
    if converted.left:
        _log.info("%s: left out %s", what, "; ".join(sorted(set(converted.left.values()))))
    if differs := _differences(converted, model, config):
        _log.warning("%s: weights of %s, trained with %s", what, project.title, "; ".join(differs))
    return {**converted.state, **{key: model.get_buffer(key) for key in model.OWN_STATE}}


def classes_of(state: Mapping[str, Tensor]) -> Classes | None:
    """Return COCO's or Cityscapes' classes for weights of another project with as many, otherwise None."""
    project = project_of(state)
    if project is None:
        return None
    try:
        converted = project.convert(state)
        section = section_of(converted.state, converted.settings.affine_norm)
    except (InputError, KeyError):  # a model that does not match: whoever loads it reports that
        return None
    return usual_classes(SECTIONS[section["type"]].model_validate(section))


def _differences(converted: Converted, model: Architecture, config: ArchitectureConfig) -> list[str]:
    """Return the settings of the weights that differ from the model's, as text."""
    wanted = converted.settings.section
    backbone = wanted.get("backbone", {})
    found: list[str] = []
    if wanted.get("conventions", config.conventions) != config.conventions:
        found.append(f"conventions {wanted['conventions']}, not {config.conventions}")
    for key, own in (("pixel_mean", model.backbone.mean), ("pixel_std", model.backbone.std)):
        theirs, ours = backbone.get(key), [255 * value for value in own]
        if theirs is not None and max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) > 0.5:
            found.append(f"backbone.{key} {[*theirs]}, not {[round(value, 3) for value in ours]}")
    for key in ("stride_in_1x1", "window", "position_fit"):
        mine = getattr(config.backbone, key)
        if backbone.get(key, mine) != mine:
            found.append(f"backbone.{key} {backbone[key]}, not {mine}")
    if (chosen := backbone.get("global_blocks")) is not None:
        depth = len(model.backbone.body.blocks)
        theirs, mine = (
            global_block_indices(depth, tuple(blocks) if isinstance(blocks, list) else blocks)
            for blocks in (chosen, config.backbone.global_blocks)
        )
        if theirs != mine:
            found.append(f"backbone.global_blocks {sorted(theirs)}, not {sorted(mine)}")
    return found
