"""Convert a weights file of another project to an export: identify the project and the model.

Structure is read from names and shapes (`architectures/foreign`). What they do not say follows the project's
defaults, is named in the report, and can be changed by overrides.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from giantdet.architectures import Architecture, build_model
from giantdet.architectures.foreign import PROJECTS, Converted, Project, project_of, translate
from giantdet.architectures.foreign.backbones import canvas_of
from giantdet.architectures.foreign.classes import named_classes, usual_classes
from giantdet.architectures.foreign.sections import section_of
from giantdet.config.architectures import SECTIONS, ArchitectureConfig
from giantdet.config.checks import validate
from giantdet.config.class_names import PUBLISHED, published
from giantdet.config.classes import Category, Classes
from giantdet.errors import ConfigError, InputError
from giantdet.export import ExportConfig
from giantdet.export_folder import CONFIG
from giantdet.layers.deferred import deferred_init, real_parameters
from giantdet.layers.weight_files import first_line, read_tensors
from giantdet.layers.weight_names import below, model_tensors, prefixes
from giantdet.layers.weights import load_strictly

SCALES: dict[str, Any] = {"size": (1344, 1344), "short_side": 800, "long_side": 1333}
"""The usual 800 to 1333 pixels, in whichever direction the image is longer; sides are multiples of 64."""
_SIDES = re.compile(r"\d+")


class Imported(NamedTuple):
    """A model with the weights of a file."""

    model: Architecture
    config: ExportConfig
    report: str


def import_weights(
    path: str | Path, overrides: Sequence[str] = (), classes: str | None = None, bgr: bool | None = None
) -> Imported:
    """Return the model of a file of another project, with its weights, and what was found.

    Args:
        path: the file, see `read_tensors`.
        overrides: `key=value` with dotted keys of an export's config.json, for example short_side=640.
        classes: a COCO JSON with the categories, a file with a name in each line, names with commas, or
            "lvis_v1" or "objects365_v2". None: COCO's or Cityscapes', by the number of classes.
        bgr: the order of the channels that the weights expect; None: that of the project.

    Raises InputError where the file is of no known project or has another model than giantdet's, and where
    tensors are missing or unknown: each is named.
    """
    found = read_tensors(path)
    project, first = _recognise(found, path)
    try:
        section = _section(project.convert(first, bgr), overrides)
    except (InputError, KeyError) as error:
        what = f"it has no tensor {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: weights of {project.title}, but {what}") from None
    raw = _with_overrides(section, overrides)
    model_config = validate(SECTIONS[raw["model"]["type"]], raw["model"], "model")
    for problem in model_config.problems():
        raise ConfigError(f"model.{problem}")
    named = _classes(classes, model_config, path)
    raw |= {"categories": named.objects, "semantic_categories": named.semantic}
    config = validate(ExportConfig, raw, CONFIG)
    with deferred_init():
        model = build_model(config.model, config.size, config.norm)
    expected = model.state_dict()
    converted = project.convert(model_tensors(found, expected, translate, str(path)), bgr)
    known = {key: model.get_buffer(key) for key in model.OWN_STATE}
    # Keys without a counterpart keep the name that the file has for them.
    theirs = {name: key for key, name in converted.names.items()}
    known |= {name if name in expected else theirs[name]: t for name, t in converted.state.items()}
    load_strictly(model, known, f"{path} of {project.title} as {config.model.type}")
    for _ in real_parameters(model, torch.float32):
        pass
    return Imported(model.eval(), config, _report(path, project, converted, config, len(found)))


def _recognise(found: Mapping[str, Tensor], path: str | Path) -> tuple[Project, dict[str, Tensor]]:
    """Return the project of a file, and its tensors without the prefix under which they are recognised."""
    for prefix in prefixes(found, len(found) / 5):
        state = below(found, prefix)
        project = project_of(state)
        if project is not None:
            return project, state
    titles = ", ".join(project.title for project in PROJECTS)
    raise InputError(
        f"{path}: no detector of {titles} has tensors of these names, such as {next(iter(found))}; name "
        "weights of a backbone in model.backbone.init_weights"
    )


def _section(converted: Converted, overrides: Sequence[str]) -> dict[str, Any]:
    """Return config.json of the export, without classes, as far as names, shapes and custom tell it."""
    settings = converted.settings
    section = _merged(section_of(converted.state, settings.affine_norm), settings.section)
    given = {override.partition("=")[0] for override in overrides}
    if settings.problem:
        raise InputError(settings.problem)
    if untold := [key for key in settings.untold if key not in given]:
        raise InputError(
            f"it lacks the rotary tables of its blocks, which tell {', '.join(untold)}: add each as "
            "key=value, such as model.backbone.global_blocks=[2,5,8,11]"
        )
    side = settings.canvas or canvas_of(converted.state)
    scales = SCALES if side is None else {"size": (side, side), "short_side": side}
    return {"model": section, **scales}


def _merged(section: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(section)
    for key, value in other.items():
        if isinstance(value, Mapping):
            result[key] = _merged(result.get(key, {}), value)
        else:
            result[key] = value
    return result


def _with_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, text = override.partition("=")
        *parents, last = key.split(".")
        node: Any = raw
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not equals or not isinstance(node, dict):
            raise ConfigError(f"override {override!r} is not of the form key=value, as in short_side=640")
        try:
            node[last] = json.loads(text)
        except ValueError:
            node[last] = text
    return raw


def _classes(given: str | None, config: ArchitectureConfig, path: str | Path) -> Classes:
    if given is not None:
        return named_classes(config, *_categories(given))
    usual = usual_classes(config)
    if usual is None:
        numbers = " and ".join(f"{key} {getattr(config, key)}" for key in config.class_keys)
        raise InputError(
            f"{path}: the model has {numbers}, which is not COCO's number: name the classes with --classes, "
            "a COCO JSON, a file of names, or comma-separated names"
        )
    return usual


def _categories(given: str) -> tuple[list[Category], list[Category]]:
    """Return the classes of things and of stuff of a COCO JSON, or those of names, which are things."""
    if given in PUBLISHED:
        return list(published(given)), []
    if "," in given:
        return list(enumerate((name.strip() for name in given.split(",")), 1)), []
    text = Path(given).expanduser().read_text()
    if not text.lstrip().startswith("{"):
        return list(enumerate(filter(None, map(str.strip, text.splitlines())), 1)), []
    try:
        records = sorted(json.loads(text)["categories"], key=lambda record: record["id"])
        split: tuple[list[Category], list[Category]] = [], []
        for record in records:
            split[record.get("isthing", 1) == 0].append((int(record["id"]), str(record["name"])))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--classes {given}: no categories in COCO's format ({first_line(error)})") from None
    return split


def _report(
    path: str | Path, project: Project, converted: Converted, config: ExportConfig, tensors: int
) -> str:
    model, named = config.model, config.classes
    classes = [f"{len(group)} classes" for group in (named.objects, named.semantic) if group]
    example = (named.objects or named.semantic)[:2]
    names = ", ".join(name for _, name in example)
    what = f"{model.type} on {model.backbone.name}, {' and '.join(classes)} ({names}, ...)"
    lines = [
        f"{path}: {project.title}, {what}",
        f"  {tensors} tensors: {len(converted.names)} taken over, {len(converted.left)} left out"
        + _others(tensors - len(converted.names) - len(converted.left)),
    ]
    for why, count in Counter(converted.left.values()).items():
        some = next(key for key, reason in converted.left.items() if reason == why)
        lines.append(f"    {count} left out, {_SIDES.sub('N', some)}: {why}")
    mean, std = model.backbone.pixel_mean, model.backbone.pixel_std
    lines.append(
        f"  conventions {model.conventions}, pixel_mean {_listed(mean)}, pixel_std {_listed(std)}"
        + (", first layer turned from blue-green-red to red-green-blue" if converted.settings.bgr else "")
    )
    if converted.settings.canvas is not None:
        chosen = model.backbone.global_blocks
        blocks = str(chosen) if isinstance(chosen, int) else ", ".join(map(str, chosen))
        lines.append(
            f"  by its rotary tables: canvas {config.size[0]} x {config.size[1]}, windows of "
            f"{model.backbone.window} patches, global blocks {blocks}"
            + (" (evenly spaced)" if isinstance(chosen, int) else "")
        )
    if converted.settings.assumed:
        lines.append(f"  assumed, because the file does not say: {converted.settings.assumed}")
    if converted.settings.note:
        lines.append(f"  {converted.settings.note}")
    return "\n".join(lines)


def _others(count: int) -> str:
    return f", {count} are not of the model (other copies, states of the optimizer)" if count else ""


def _listed(values: Sequence[float] | None) -> str:
    return "of timm's weights" if values is None else ", ".join(f"{value:g}" for value in values)
