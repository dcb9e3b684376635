"""JSON Schema of a run's JSON, for editors: `python -m giantdet.config.schema` writes schema.json.

The giantdet block comes from the types with their docstrings, DeepSpeed's keys from
config/deepspeed_keys.py. `load_run` checks more than a schema can say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from giantdet.config import deepspeed_keys as ds
from giantdet.config import plugins
from giantdet.config.lengths import LENGTH_PATTERN
from giantdet.config.types import GiantdetConfig

SCHEMA_PATH = Path(__file__).with_name("schema.json")
DEEPSPEED_DOCS = "https://www.deepspeed.ai/docs/config-json/"

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def build_schema() -> dict[str, Any]:
    """The whole schema, draft 2020-12."""
    giantdet = GiantdetConfig.model_json_schema()
    definitions = giantdet.pop("$defs")
    properties: dict[str, Any] = {
        "$schema": {"type": "string", "description": "Path of this schema, so that editors complete."},
        "about": {
            "type": ["string", "object"],
            "description": "For readers: command, hardware, expected result.",
        },
        "giantdet": giantdet,
    }
    for key, spec in ds.KEYS.items():
        auto = key in (*ds.AUTO_BATCH, *ds.AUTO_BLOCKS, "gradient_clipping")
        properties[key] = _schema_of(spec, auto)
    for block, known, auto_keys in (
        ("optimizer", plugins.OPTIMIZERS, ()),
        ("scheduler", plugins.SCHEDULERS, plugins.AUTO_SCHEDULER),
    ):
        properties[block]["properties"]["type"] = {"enum": list(known)}
        properties[block]["allOf"] = [
            {
                "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
                "then": {
                    "properties": {
                        "params": _object({k: _schema_of(s, k in auto_keys) for k, s in p.items()})
                    }
                },
            }
            for name, p in known.items()
        ]
        properties[block]["required"] = ["type"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A giantdet run",
        "description": f"A DeepSpeed JSON ({DEEPSPEED_DOCS}) with one more block, giantdet.",
        **_object(properties),
        "required": ["giantdet", "optimizer"],
        "$defs": definitions,
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _schema_of(spec: Any, auto: bool) -> dict[str, Any]:
    if spec is object:
        return {}
    if spec == plugins.LENGTH:
        kinds: list[dict[str, Any]] = [
            {"type": "integer", "minimum": 0},
            {"type": "string", "pattern": LENGTH_PATTERN},
        ]
        return {"anyOf": [*kinds, {"const": "auto"}] if auto else kinds}
    if isinstance(spec, dict):
        schema = _object({key: _schema_of(inner, auto) for key, inner in spec.items()})
        return schema
    schema = {"enum": list(spec)} if isinstance(spec, tuple) else {"type": _TYPES[spec]}
    return {"anyOf": [schema, {"const": "auto"}]} if auto else schema


def render() -> str:
    """The text of schema.json."""
    return json.dumps(build_schema(), indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA_PATH.write_text(render(), encoding="utf-8")
    print(f"wrote {SCHEMA_PATH}")
