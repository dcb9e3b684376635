"""Write the JSON Schema of a run's JSON, for editors: `python -m giantdet.config.schema` makes schema.json.

Both halves are generated from the types and their docstrings. `load_run` checks more than a schema can
express.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from giantdet.config.deepspeed import DeepSpeedConfig
from giantdet.config.optimizers import OPTIMIZERS
from giantdet.config.schedulers import SCHEDULERS
from giantdet.config.section import Section
from giantdet.config.types import GiantdetConfig

SCHEMA_PATH = Path(__file__).with_name("schema.json")
DEEPSPEED_DOCS = "https://www.deepspeed.ai/docs/config-json/"


def build_schema() -> dict[str, Any]:
    """Return the whole schema, draft 2020-12."""
    sections: list[type[Section]] = [
        GiantdetConfig,
        DeepSpeedConfig,
        *OPTIMIZERS.values(),
        *SCHEDULERS.values(),
    ]
    keys, both = models_json_schema([(section, "validation") for section in sections])
    definitions = both["$defs"]
    run = definitions.pop("DeepSpeedConfig")
    properties: dict[str, Any] = {
        "$schema": {"type": "string", "description": "Path of this schema, for completion in editors."},
        "about": {
            "type": ["string", "object"],
            "description": "For readers: command, hardware, expected result.",
        },
        "giantdet": keys[GiantdetConfig, "validation"],
        **run["properties"],
    }
    for block, known in (("OptimizerBlock", OPTIMIZERS), ("SchedulerBlock", SCHEDULERS)):
        definitions[block]["properties"]["type"] = {"enum": list(known)}
        definitions[block]["allOf"] = [
            {
                "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
                "then": {"properties": {"params": {"$ref": f"#/$defs/{name}"}}},
            }
            for name in known
        ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A giantdet run",
        "description": f"A DeepSpeed JSON ({DEEPSPEED_DOCS}) with one more block, giantdet.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "required": ["giantdet", "optimizer"],
        "$defs": definitions,
    }


def render() -> str:
    """Return the text of schema.json."""
    return json.dumps(build_schema(), indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA_PATH.write_text(render(), encoding="utf-8")
    print(f"wrote {SCHEMA_PATH}")
