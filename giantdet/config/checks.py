"""Checks of a run's two halves: every key known, every value of its type, every error one line.

DeepSpeed's half is held against the tables of config/deepspeed_keys.py, the giantdet block against
the types of config/types.py.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from giantdet.config import deepspeed_keys as ds
from giantdet.config import plugins
from giantdet.config.architectures import SECTIONS
from giantdet.config.lengths import LENGTH_WORDS, is_length
from giantdet.config.types import GiantdetConfig
from giantdet.errors import ConfigError


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?` with the nearest of `names`, by the whole or by the last part, or nothing."""
    short, last = {}, {}
    for candidate in reversed(list(names)):
        key = candidate.lower().removeprefix("giantdet.")
        short[key] = last[key.rsplit(".", 1)[-1]] = candidate
    name = name.lower().removeprefix("giantdet.")
    # The right name at the wrong place: `batch_size` for `giantdet.eval.batch_size`.
    if name.rsplit(".", 1)[-1] in last and name not in short:
        return f"; did you mean {last[name.rsplit('.', 1)[-1]]}?"
    match = difflib.get_close_matches(name, short, n=1, cutoff=0.6)
    if match:
        return f"; did you mean {short[match[0]]}?"
    match = difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1, cutoff=0.75)
    return f"; did you mean {last[match[0]]}?" if match else ""


def all_paths() -> list[str]:
    """Dotted paths of everything that can be set, for suggestions."""
    paths: list[str] = []

    def walk(spec: dict[str, Any], prefix: str) -> None:
        for key, value in spec.items():
            paths.append(prefix + key)
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(ds.KEYS, "")
    for params in plugins.OPTIMIZERS.values():
        walk(params, "optimizer.params.")
    for params in plugins.SCHEDULERS.values():
        walk(params, "scheduler.params.")
    walk(giantdet_keys(), "giantdet.")
    return paths


def giantdet_keys(architecture: str | None = None) -> dict[str, Any]:
    """Nested names of the giantdet block's fields; leaves are None. Of one architecture, or of all."""

    def walk(section: Any) -> dict[str, Any]:
        return {name: _subsection(info.annotation, walk) for name, info in section.model_fields.items()}

    keys = walk(GiantdetConfig)
    keys["model"] = {}
    for name, section in SECTIONS.items():
        if architecture in (None, name):
            keys["model"] |= walk(section)
    return keys


def _subsection(annotation: Any, walk: Any) -> Any:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if hasattr(candidate, "model_fields"):
            return walk(candidate)
    return None


def show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- DeepSpeed's half ---------------------------------------------------------------------------


def check_deepspeed(config: dict[str, Any]) -> None:
    for key, value in config.items():
        auto = key in (*ds.AUTO_BATCH, *ds.AUTO_BLOCKS, "gradient_clipping")
        _check_value(key, value, ds.KEYS[key], auto)
    for key in ds.AUTO_BATCH:
        if key in config and config[key] != "auto" and config[key] < 1:
            raise ConfigError(f"{key} must be at least 1, got {show(config[key])}")
    clipping = config.get("gradient_clipping", 0)
    if clipping != "auto" and clipping < 0:
        raise ConfigError(f"gradient_clipping must not be negative (0: no clipping), got {show(clipping)}")
    on = [name for name in ("bf16", "fp16", "torch_autocast") if config.get(name, {}).get("enabled") is True]
    if len(on) > 1:
        raise ConfigError(f"{' and '.join(f'{n}.enabled' for n in on)} exclude each other; switch one off")
    _check_plugin(config, "optimizer", plugins.OPTIMIZERS, ())
    if "scheduler" in config:
        _check_plugin(config, "scheduler", plugins.SCHEDULERS, plugins.AUTO_SCHEDULER)


def _check_plugin(
    config: dict[str, Any], block: str, known: dict[str, dict[str, Any]], auto: Sequence[str]
) -> None:
    """Check `optimizer` or `scheduler`: name, parameters, and what must be said."""
    name = config.get(block, {}).get("type")
    if name is None:
        raise ConfigError(f"{block}.type is missing; known are {', '.join(known)}")
    canonical = canonical_name(name, known)
    if canonical is None:
        hint = nearest(name, known) or f"; known are {', '.join(known)}"
        raise ConfigError(f"{block}.type: {show(name)} is not supported{hint}")
    params = config[block].get("params", {})
    for key, value in params.items():
        path = f"{block}.params.{key}"
        if path in ds.UNSUPPORTED:
            raise ConfigError(f"{path} {ds.UNSUPPORTED[path]}")
        if key not in known[canonical]:
            raise ConfigError(f"unknown key {path} of {canonical}{nearest(key, known[canonical])}")
        _check_value(path, value, known[canonical][key], key in auto)
    _check_ranges(block, params)
    if canonical == "WarmupMultiStepLR":
        _check_milestones(params)
    required = ("lr",) if block == "optimizer" else plugins.SCHEDULER_REQUIRED.get(canonical, ())
    for key in required:
        if key not in params:
            raise ConfigError(f"{block}.params.{key} is missing; {canonical} needs it")


def _check_ranges(block: str, params: dict[str, Any]) -> None:
    """What the optimizers and schedules themselves refuse, late and in words of their own."""
    for key in ("lr", "eps", "weight_decay", "momentum", *plugins.SCHEDULER_LRS):
        value = params.get(key)
        if value not in (None, "auto") and value < 0:
            raise ConfigError(f"{block}.params.{key} must not be negative, got {show(value)}")
    for key in plugins.SCHEDULER_PERIODS:
        if params.get(key) == 0:
            raise ConfigError(f"{block}.params.{key} must be at least 1 step, got 0")
    betas = params.get("betas", [0.9, 0.99])
    if len(betas) != 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in betas):
        raise ConfigError(
            f"{block}.params.betas must be two numbers of at least 0 and less than 1, got {show(betas)}"
        )
    if params.get("nesterov") and (params.get("momentum", 0.9) == 0 or params.get("dampening", 0) != 0):
        raise ConfigError(f"{block}.params.nesterov needs a momentum, and no dampening")


def _check_milestones(params: dict[str, Any]) -> None:
    for i, value in enumerate(params.get("milestones", [])):
        _check_value(f"scheduler.params.milestones.{i}", value, plugins.LENGTH, False)
    gamma, count = params.get("gamma", 0.1), len(params.get("milestones", []))
    for value in gamma if isinstance(gamma, list) else [gamma]:
        _check_value("scheduler.params.gamma", value, float, False)
    if isinstance(gamma, list) and len(gamma) != count:
        raise ConfigError(
            f"scheduler.params.gamma has {len(gamma)} values for {count} milestones; give as many"
        )


def canonical_name(name: str, known: Iterable[str]) -> str | None:
    """The name as spelt in `known`, whatever the case of `name`; None if it is not there."""
    return next((k for k in known if k.lower() == name.lower()), None)


def _check_value(path: str, value: Any, spec: Any, auto: bool) -> None:
    if isinstance(spec, dict):
        if not isinstance(value, dict):
            raise ConfigError(f"{path} must be an object, got {show(value)}")
        for key, inner in value.items():
            full = f"{path}.{key}"
            if full in ds.UNSUPPORTED:
                raise ConfigError(f"{full} {ds.UNSUPPORTED[full]}")
            if key not in spec:
                raise ConfigError(f"unknown key {full}{nearest(key, spec)}")
            _check_value(full, inner, spec[key], auto)
        return
    if spec is object or (auto and value == "auto") or (spec is str and value is None):
        return
    if spec == plugins.LENGTH:
        if not is_length(value) or (not isinstance(value, str) and value < 0):
            or_auto = ', or "auto"' if auto else ""
            raise ConfigError(f"{path} must be {LENGTH_WORDS}{or_auto}, got {show(value)}")
        return
    if isinstance(spec, tuple):
        # `True == 1` in Python, but not in JSON.
        if isinstance(value, bool) or value not in spec:
            names = ", ".join(map(show, spec))
            hint = nearest(value, map(str, spec)) if isinstance(value, str) else ""
            raise ConfigError(f"{path} must be one of {names}, got {show(value)}{hint}")
        return
    # Neither 1e999, which Python reads as infinity, nor a whole number that no float holds.
    number = (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )
    fits = {
        bool: isinstance(value, bool),
        int: number and float(value).is_integer(),
        float: number,
        str: isinstance(value, str),
        list: isinstance(value, list),
        dict: isinstance(value, dict),
    }
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    or_auto = ' or "auto"' if auto else ""
    if not fits[spec]:
        raise ConfigError(f"{path} must be {words[spec]}{or_auto}, got {show(value)}")


# --- giantdet's half ----------------------------------------------------------------------------


def parse_giantdet(block: dict[str, Any]) -> GiantdetConfig:
    try:
        # JSON mode: lists become tuples and 1 a float, but neither "1" nor "True" becomes a number.
        config = GiantdetConfig.model_validate_json(json.dumps(block), strict=True)
    except ValidationError as error:
        messages = _one_liners(error, block)
        more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        raise ConfigError(messages[0] + more) from None
    _check_giantdet(config)
    return config


_WORDS = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "tuple_type": "a list",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "string_pattern_mismatch": LENGTH_WORDS,
}


def _one_liners(error: ValidationError, block: dict[str, Any]) -> list[str]:
    """One message a key; the alternatives of a union are joined by "or"."""
    wishes: dict[str, list[str]] = {}
    messages: dict[str, str] = {}
    for item in error.errors():
        kind, context, location = item["type"], item.get("ctx", {}), item["loc"]
        architecture = None
        if location[:1] == ("model",) and len(location) > 1:  # pydantic adds the name of the architecture
            architecture, location = str(location[1]), ("model", *location[2:])
        names = [str(part) for part in location]
        if kind.startswith("union_tag"):
            location, kind = ("model", "type"), "literal_error"
            context = {"expected": " or ".join(f"'{name}'" for name in SECTIONS)}
        if kind in ("extra_forbidden", "missing"):
            path = ".".join(["giantdet", *names])
            if kind == "missing":
                messages[path] = f"{path} is missing"
            else:
                messages[path] = f"unknown key {path}{_hint(names, architecture)}"
            continue
        # pydantic appends the alternative it tried to the location of a union; stop at the value.
        value: Any = block
        taken: list[str] = []
        for part in location:
            if not (isinstance(value, list) and isinstance(part, int)) and not (
                isinstance(value, dict) and part in value
            ):
                break
            value = value[part]  # type: ignore[call-overload,index]
            taken.append(str(part))
        path = ".".join(["giantdet", *taken])
        limits = {
            "greater_than": f"greater than {context.get('gt')}",
            "greater_than_equal": f"at least {context.get('ge')}",
            "less_than_equal": f"at most {context.get('le')}",
            "literal_error": f"{context.get('expected')}".replace("'", '"'),
            "too_short": f"a list of at least {context.get('min_length')}",
            "too_long": f"a list of at most {context.get('max_length')}",
        }
        wish = _WORDS.get(kind) or limits.get(kind) or item["msg"].replace("Input should be ", "")
        wishes.setdefault(path, []).append(wish)
        hint = ""
        if kind == "literal_error" and isinstance(value, str):
            hint = nearest(value, str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", "))
        messages[path] = f"{path} must be {' or '.join(wishes[path])}, got {show(value)}{hint}"
    return list(messages.values())


def _hint(names: list[str], architecture: str | None) -> str:
    """What an unknown key may have been meant to be, or the architectures that have it."""
    owners = [name for name in SECTIONS if architecture and _has(giantdet_keys(name), names)]
    if owners:
        return f": it is a key of {', '.join(owners)}, and giantdet.model.type is {architecture}"
    siblings: Any = giantdet_keys(architecture)
    for name in names[:-1]:
        siblings = siblings[name]
    return nearest(names[-1], siblings) or nearest(".".join(names), all_paths())


def _has(keys: Any, names: list[str]) -> bool:
    for name in names:
        if not isinstance(keys, dict) or name not in keys:
            return False
        keys = keys[name]
    return True


def _check_giantdet(config: GiantdetConfig) -> None:
    """What concerns more than one value, or more than a type can say."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    train, data, model = config.train, config.data, config.model
    require(
        (train.epochs is None) != (train.steps is None),
        "give either giantdet.train.epochs or giantdet.train.steps, "
        + ("not both" if train.epochs is not None else "neither is there"),
    )
    # P2 to P5 halve exactly at multiples of 32; P6 subsamples P5 and takes any size.
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
    require(
        data.augment.short_sides is None or len(data.augment.short_sides) > 0,
        "giantdet.data.augment.short_sides must not be empty; leave it out to use giantdet.data.short_side",
    )
    for problem in model.problems():
        raise ConfigError(f"giantdet.model.{problem}")
