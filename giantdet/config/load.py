"""Read a run's JSON: one file, overrides by dotted path, and errors that name the key.

A run is a valid DeepSpeed JSON plus `"giantdet"` (config/types.py), `"about"` (free text for readers)
and `"$schema"` (for editors). Unknown keys are errors in both halves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from giantdet.config.checks import check_deepspeed, parse_giantdet, show
from giantdet.config.deepspeed import DeepSpeedConfig
from giantdet.config.names import all_paths, nearest
from giantdet.config.types import GiantdetConfig
from giantdet.config.unsupported import UNSUPPORTED
from giantdet.errors import ConfigError

__all__ = ["ConfigError", "RunConfig", "load_run", "parse_run"]

OWN_KEYS = ("giantdet", "about", "$schema")
DEEPSPEED_KEYS = tuple(DeepSpeedConfig.model_fields)


@dataclass(frozen=True)
class RunConfig:
    """A checked run; `deepspeed` is DeepSpeed's half of the JSON, which must not be modified in place."""

    giantdet: GiantdetConfig
    deepspeed: dict[str, Any] = field(default_factory=dict)
    about: str | dict[str, Any] | None = None
    path: Path | None = None


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run, apply the overrides, check it and return it; "auto" values stay (config/resolve.py).

    An override is `key=value` with a dotted key: `train_batch_size=8`, `zero_optimization.stage=3`,
    `giantdet.train.steps=10`. `giantdet.` may be left out before one of its sections (`train.steps=10`). The
    value is read as JSON, or as a string where it is not JSON. `~key` removes the key, so that its default
    applies. They are applied in their order: the last of several for one key counts. A run has either epochs
    or steps, so overriding one of them removes the other from the file's values.

    Raises ConfigError with one line that names the key.
    """
    path = Path(path).expanduser()
    raw = _read_json(path)
    _apply_overrides(raw, overrides)
    return parse_run(raw, path)


def parse_run(raw: dict[str, Any], path: Path | None = None) -> RunConfig:
    """Check a parsed JSON object and return its run. Raises ConfigError."""
    known = [*DEEPSPEED_KEYS, *OWN_KEYS]
    for key in raw:
        if key in UNSUPPORTED:
            raise ConfigError(f"{key} {UNSUPPORTED[key]}")
        if key not in known:
            where = " (it belongs in the giantdet block)" if key in GiantdetConfig.model_fields else ""
            raise ConfigError(f"unknown key {key}{where}{nearest(key, [*known, *all_paths()])}")
    if not isinstance(raw.get("about", ""), str | dict):
        raise ConfigError(f"about must be a string or an object, got {show(raw['about'])}")
    if not isinstance(raw.get("giantdet"), dict):
        raise ConfigError(
            'the "giantdet" block is missing: a run is a DeepSpeed JSON with one more block, see ds_configs'
            if "giantdet" not in raw
            else f"giantdet must be an object, got {show(raw['giantdet'])}"
        )
    deepspeed = {key: value for key, value in raw.items() if key not in OWN_KEYS}
    check_deepspeed(deepspeed)
    deepspeed = _with_homes(deepspeed)
    return RunConfig(parse_giantdet(raw["giantdet"]), deepspeed, raw.get("about"), path)


def _with_homes(block: Any, key: str = "") -> Any:
    """Return DeepSpeed's half with ~ at the start of its paths replaced by the home folder."""
    if isinstance(block, dict):
        return {name: _with_homes(value, name) for name, value in block.items()}
    is_path = isinstance(block, str) and key.endswith("_path")
    return os.path.expanduser(block) if is_path else block


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except FileNotFoundError:
        siblings = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file{nearest(path.name, siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        raw = _parse_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # ConfigError; numbers of 5,000 digits; deeply nested lists
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a JSON object, got {show(raw)}")
    return raw


def _parse_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ConfigError(f"key {key} is given twice in the same object")
            if not key.isprintable() or (isinstance(value, str) and not _is_text(value)):
                raise ConfigError(f"key {show(key)} or its value contains characters that are not text")
            result[key] = value
        return result

    def no_constant(name: str) -> Any:
        raise ConfigError(f"{name} is not a JSON number")

    return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)


def _is_text(text: str) -> bool:
    """Return whether a text has no NUL, which paths cannot contain, and no surrogate, which UTF-8 cannot."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    given: set[str] = set()
    for override in overrides:
        removes = override.startswith("~")
        key, equals, text = override.removeprefix("~").partition("=")
        key = key.strip()
        parts = key.split(".")
        if bool(equals) == removes or not all(parts):
            raise ConfigError(
                f"override {override!r} is not of the form key=value, as in train.steps=100, or ~key, which "
                "removes a key"
            )
        if parts[0] in GiantdetConfig.model_fields:
            parts.insert(0, "giantdet")
        elif parts[0] not in DEEPSPEED_KEYS and parts[0] not in (*OWN_KEYS, *UNSUPPORTED):
            raise ConfigError(f"override {override!r}: unknown key {key}{nearest(key, all_paths())}")
        if removes:
            _remove(raw, parts, override)
            given.discard(".".join(parts))
            continue
        given.add(".".join(parts))
        value = _override_value(override, text)
        node = raw
        for depth, part in enumerate(parts[:-1], start=1):
            node[part] = {} if node.get(part) is None else node[part]
            node = node[part]
            if not isinstance(node, dict):
                hint = "; override the whole list" if isinstance(node, list) else ""
                raise ConfigError(
                    f"override {override!r}: {'.'.join(parts[:depth])} is {show(node)}, not an object{hint}"
                )
        node[parts[-1]] = value
    # An override replaces the other key only if that is from the file. Overriding both is an error.
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if f"giantdet.train.{one}" in given and f"giantdet.train.{other}" not in given:
            raw["giantdet"]["train"].pop(other, None)


def _override_value(override: str, text: str) -> Any:
    """Return the value of an override: JSON, or a string where it is not JSON."""
    try:
        value = _parse_json(text)
    except json.JSONDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"override {override[:60]!r}: {error}") from None
    if isinstance(value, str) and not _is_text(value):
        raise ConfigError(f"override {override!r}: its value contains characters that are not text")
    return value


def _remove(raw: dict[str, Any], parts: Sequence[str], override: str) -> None:
    """Remove a key. Raises ConfigError if it is not there, as a mistyped key would not be."""
    node: Any = raw
    for part in parts[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or parts[-1] not in node:
        siblings = node if isinstance(node, dict) else ()
        raise ConfigError(
            f"override {override!r}: the run has no key {'.'.join(parts)}{nearest(parts[-1], siblings)}"
        )
    del node[parts[-1]]
