"""Check a run's JSON: keys must be known, values must have their type, and every error is one line.

Both halves of the JSON are sections (config/section.py), which pydantic validates. This file turns its errors
into lines that name the key, and checks combinations of values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from giantdet.config.datasets import sections
from giantdet.config.deepspeed import DeepSpeedConfig
from giantdet.config.lengths import LENGTH_WORDS
from giantdet.config.names import all_paths, keys_of, nearest
from giantdet.config.optimizers import OPTIMIZERS, OptimizerConfig
from giantdet.config.precision import check_precision
from giantdet.config.schedulers import SCHEDULERS, SchedulerConfig
from giantdet.config.section import LISTS, Section
from giantdet.config.types import UNIONS, DataConfig, GiantdetConfig
from giantdet.config.unsupported import UNSUPPORTED
from giantdet.errors import ConfigError

S = TypeVar("S", bound=Section)


def show(value: Any) -> str:
    """Return a value of the JSON as messages show it, at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Validation of any section


def validate(section: type[S], value: Any, path: str = "", owner: str = "") -> S:
    """Return `value` as a section. Raises ConfigError with one line; the keys in it begin with `path`.

    `owner`, the name of an optimizer or schedule, appears in messages about unknown and missing keys.
    """
    _refuse_unsupported(value, path)
    try:
        # JSON mode: lists become tuples and 1 a float, but neither "1" nor "True" becomes a number.
        return section.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        messages = _one_liners(error, section, value, path, owner)
        more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        raise ConfigError(messages[0] + more) from None


def _refuse_unsupported(value: Any, path: str) -> None:
    for key, inner in value.items() if isinstance(value, dict) else ():
        full = _join(path, key)
        if full in UNSUPPORTED:
            raise ConfigError(f"{full} {UNSUPPORTED[full]}")
        _refuse_unsupported(inner, full)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


_WORDS = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer",
    "float_type": "a number",
    "finite_number": "a number",
    "string_type": "a string",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "sections_type": "an object or a list of objects",
    "model_attributes_type": "an object",
    "string_pattern_mismatch": LENGTH_WORDS,
}


def _one_liners(
    error: ValidationError, section: type[Section], value: Any, prefix: str, owner: str
) -> list[str]:
    """Return one message per key; the alternatives of a union are joined by "or"."""
    wishes: dict[str, list[str]] = {}
    messages: dict[str, str] = {}
    for item in error.errors():
        kind, context, location = item["type"], item.get("ctx", {}), item["loc"]
        where = next((path for path in UNIONS if location[: len(path)] == path), None)
        if section is not GiantdetConfig:
            where = None
        chosen = None
        if where is not None:
            key, types = UNIONS[where]
            if location[len(where) : len(where) + 1] == (LISTS,):  # the position in the list follows
                location = (*where, *location[len(where) + 1 :])
                if len(location) > len(where):
                    where = (*where, str(location[len(where)]))
            at = location[: len(where)]
            if kind.startswith("union_tag") and not isinstance(_value_at(value, at)[0], dict):
                may_be_list = where in UNIONS and where[0] == "data"
                location, kind = at, "sections_type" if may_be_list else "model_type"
            elif kind.startswith("union_tag"):
                location, kind = (*at, key), "literal_error"
                context = {"expected": " or ".join(f"'{name}'" for name in types)}
            elif len(location) > len(where):  # pydantic adds the name of the type
                chosen, location = str(location[len(where)]), (*at, *location[len(where) + 1 :])
        names = [str(part) for part in location]
        if kind == "extra_forbidden":
            of = f" of {owner}" if owner else ""
            path = _join(prefix, *names)
            removal = f"; remove it with the override ~{path}" if owner else ""  # of the file's former type
            messages[path] = f"unknown key {path}{of}{_hint(section, names, where, chosen) or removal}"
            continue
        if kind == "missing":
            needs = f"; {owner} needs it" if owner else ""
            path = _join(prefix, *names)
            messages[path] = f"{path} is missing{needs}"
            continue
        found, taken = _value_at(value, location)
        path = _join(prefix, *taken)
        wish = _wish(kind, context, item["msg"])
        if wish not in wishes.setdefault(path, []):
            wishes[path].append(wish)
        hint = ""
        if kind == "literal_error" and isinstance(found, str):
            hint = nearest(found, _choices(context))
        messages[path] = f"{path} must {_be(wishes[path])}, got {show(found)}{hint}"
    # A key that is unknown is often the one that another message misses.
    return sorted(messages.values(), key=lambda message: not message.startswith("unknown key"))


def _value_at(value: Any, location: tuple[int | str, ...]) -> tuple[Any, list[str]]:
    """Return the value that an error is about, and its path.

    The location may be longer than the path: for a union it ends with the alternative that was tried.
    """
    taken: list[str] = []
    for part in location:
        inside = isinstance(value, list) and isinstance(part, int)
        if not inside and not (isinstance(value, dict) and part in value):
            break
        value = value[part]
        taken.append(str(part))
    return value, taken


def _choices(context: Mapping[str, Any]) -> list[str]:
    return str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", ")


def _wish(kind: str, context: Mapping[str, Any], message: str) -> str:
    """Return what a value should be, as words that follow "must be"."""
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", '"').replace(" or ", ", ")
        return f"one of {choices}" if ", " in choices else choices
    limits = {
        "greater_than": f"greater than {context.get('gt')}",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than": f"less than {context.get('lt')}",
        "less_than_equal": f"at most {context.get('le')}",
        "too_short": f"a list of at least {context.get('min_length')}",
        "too_long": f"a list of at most {context.get('max_length')}",
        "wish": message,
    }
    return _WORDS.get(kind) or limits.get(kind) or message.replace("Input should be ", "")


_LIMITS = ("at least ", "at most ", "greater than ", "less than ")


def _be(wishes: list[str]) -> str:
    # For a number out of range only the limits are shown: the other alternatives of a union do not help.
    limits = [wish for wish in wishes if wish.startswith(_LIMITS)]
    if limits in (["at least 0"], ["at least 0.0"]):
        return "not be negative"
    return f"be {' or '.join(limits or wishes)}"


def _hint(section: type[Section], names: list[str], where: tuple[str, ...] | None, chosen: str | None) -> str:
    """Return a hint for an unknown key: the types of a section that have it, or a similar key."""
    if where is not None and chosen is not None:
        key, types = UNIONS[where[:2]]  # without the position in a list
        names = [name for name in names if not name.isdecimal()]
        owners = [name for name in types if _has(keys_of(section, name), names)]
        if owners:
            return f": it is a key of {', '.join(owners)}, and giantdet.{_join(*where, key)} is {chosen}"
    siblings: Any = keys_of(section, chosen)
    for name in names[:-1]:
        siblings = siblings[name]
    paths = all_paths()
    if section is not GiantdetConfig:
        # Only what is deeper in the same block: otherwise the most similar path is the block itself.
        inside, depth = f"{names[0]}.", len(names)
        paths = [path for path in paths if path.startswith(inside) and path.count(".") >= depth]
    return nearest(names[-1], siblings) or nearest(".".join(names), paths)


def _has(keys: Any, names: list[str]) -> bool:
    for name in names:
        if not isinstance(keys, dict) or name not in keys:
            return False
        keys = keys[name]
    return True


# The two halves


def check_deepspeed(raw: dict[str, Any]) -> DeepSpeedConfig:
    """Return DeepSpeed's half as types. Raises ConfigError."""
    for block in ("optimizer", "scheduler"):
        if block == "optimizer" or block in raw:
            plugin(block, raw.get(block, {}))
    config = validate(DeepSpeedConfig, raw)
    check_precision(config)
    return config


def plugin(block: str, content: Any) -> OptimizerConfig | SchedulerConfig:
    """Return the section of an `optimizer` or `scheduler` block. Raises ConfigError."""
    known = cast("dict[str, type[Section]]", OPTIMIZERS if block == "optimizer" else SCHEDULERS)
    if not isinstance(content, dict):
        hint = f"; set {block}.type" if isinstance(content, str) else ""
        raise ConfigError(f"{block} must be an object, got {show(content)}{hint}")
    name = content.get("type")
    if name is None:
        raise ConfigError(f"{block}.type is missing; known are {', '.join(known)}")
    if not isinstance(name, str):
        raise ConfigError(f"{block}.type must be a string, got {show(name)}")
    canonical = canonical_name(name, known)
    if canonical is None:
        hint = nearest(name, known) or f"; known are {', '.join(known)}"
        raise ConfigError(f"{block}.type: {show(name)} is not supported{hint}")
    section = validate(known[canonical], content.get("params", {}), f"{block}.params", canonical)
    assert isinstance(section, OptimizerConfig | SchedulerConfig)
    for problem in section.problems():
        raise ConfigError(f"{block}.params.{problem}")
    return section


def canonical_name(name: str, known: Mapping[str, Any]) -> str | None:
    """Return the name as it is spelt in `known`, whatever the case of `name`; None if it is unknown."""
    return next((k for k in known if k.lower() == name.lower()), None)


def parse_giantdet(block: dict[str, Any]) -> GiantdetConfig:
    """Return the giantdet block as types. Raises ConfigError."""
    config = validate(GiantdetConfig, block, "giantdet")
    _check_giantdet(config)
    return config


def _check_giantdet(config: GiantdetConfig) -> None:
    """Raise ConfigError for wrong combinations of values, and for limits that types cannot express."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    train, data, model = config.train, config.data, config.model
    require(
        (train.epochs is None) != (train.steps is None),
        "give either giantdet.train.epochs or giantdet.train.steps, "
        + ("not both" if train.epochs is not None else "neither is there"),
    )
    # The sides of P2 to P5 are whole numbers for multiples of 32; P6 subsamples P5, whatever its size.
    rounded = [max(32, round(side / 32) * 32) for side in data.size]
    require(
        list(data.size) == rounded,
        f"giantdet.data.size must be multiples of 32, got {list(data.size)}; nearest is {rounded}",
    )
    if data.augment.jitter is not None:
        low, high = data.augment.jitter
        require(
            0 < low <= high,
            f"giantdet.data.augment.jitter must be [low, high] with 0 < low <= high, got {[low, high]}",
        )
        require(
            data.augment.short_sides is None,
            "giantdet.data.augment.jitter and giantdet.data.augment.short_sides exclude each other; drop one",
        )
    if data.augment.scale is not None:
        low, high = data.augment.scale
        require(
            0 < low <= high,
            f"giantdet.data.augment.scale must be [low, high] with 0 < low <= high, got {[low, high]}",
        )
        for other in ("jitter", "short_sides"):
            require(
                getattr(data.augment, other) is None,
                f"giantdet.data.augment.scale and giantdet.data.augment.{other} exclude each other; drop one",
            )
    require(
        data.augment.short_sides is None or len(data.augment.short_sides) > 0,
        "giantdet.data.augment.short_sides must not be empty; leave it out to use giantdet.data.short_side",
    )
    validation = [] if data.val is None else sections(data.val)
    require(
        len(validation) < 2 or all(section.format != "lvis" for _, section in validation),
        'giantdet.data.val has a data set of "format": "lvis" in a list; LVIS\'s scores are for one data '
        "set: give it alone, and evaluate the others with `giantdet eval`",
    )
    _check_weights(data)
    require(
        train.export_backbone or model.backbone.frozen,
        "giantdet.train.export_backbone false needs a frozen backbone: set giantdet.model.backbone.frozen",
    )
    if model.backbone.frozen:
        _check_frozen_backbone(config)
    for problem in model.problems():
        raise ConfigError(f"giantdet.model.{problem}")


def _check_weights(data: DataConfig) -> None:
    """Raise ConfigError unless all data sets of a list in `data.train` have a weight, or none anywhere."""
    for split, config in (("train", data.train), ("val", data.val)):
        found = [] if config is None else sections(config)
        given = [place for place, section in found if section.weight is not None]
        if given and (split == "val" or len(found) == 1):
            raise ConfigError(
                f"giantdet.data.{split}{given[0]}.weight is the share of one of several data sets in "
                "data.train; leave it out"
            )
        if given and len(given) < len(found):
            without = next(place for place, _ in found if place not in given)
            raise ConfigError(
                f"giantdet.data.{split}{given[0]}.weight is given, and giantdet.data.{split}{without} has "
                "none: give all of them a weight"
            )


def _check_frozen_backbone(config: GiantdetConfig) -> None:
    """Raise ConfigError for settings that need a backbone that is trained."""
    backbone = config.model.backbone
    key = "giantdet.model.backbone"
    if backbone.frozen_stages:
        raise ConfigError(
            f"{key}.frozen freezes all stages, {key}.frozen_stages some of them: give one of them"
        )
    if backbone.deformable_stages:
        raise ConfigError(
            f"{key}.frozen excludes {key}.deformable_stages, whose offsets are learnt: drop one"
        )
    if config.norm.type == "cgbn":
        raise ConfigError(
            "giantdet.norm.type cgbn is for a backbone that is trained, and giantdet.model.backbone.frozen "
            'makes its batch norms constants: set norm.type to "frozen", and cgbn for the other parts'
        )
    agvm = config.agvm
    if agvm.enabled and agvm.modules is None and agvm.anchor == "backbone":
        raise ConfigError(
            "giantdet.agvm.anchor is the backbone, which has no gradients because of "
            "giantdet.model.backbone.frozen: set agvm.anchor to another module, such as the pyramid"
        )
