"""Write docs/keys.md, every key of a run's JSON, from the JSON Schema: python scripts/keys.py

A test checks that the page is current.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from giantdet.config.schema import build_schema

PAGE = Path(__file__).resolve().parents[1] / "docs/keys.md"
REF = "#/$defs/"
LENGTH = "step|epoch|image"  # part of the regular expression of lengths
LONGEST_DEFAULT = 40  # characters

HEAD = """# Every key

Look up any key of a run's JSON: its values, its default and what it does.
[configuration.md](configuration.md) shows how a run is put together, and
`giantdet train --config RUN.json --print-config` what yours resolves to.

A dash as the default means that the key has to be given. A length is a number of steps, `"2 epochs"` or
`"90000 images"`. `python scripts/keys.py` makes this page from the JSON Schema
(`giantdet/config/schema.json`).
"""
DEEPSPEED = """## DeepSpeed's keys

These stand at the top level of the JSON. DeepSpeed 0.19.8 defines them, and its
[documentation](https://www.deepspeed.ai/docs/config-json/) explains those without a description here.
"""


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")


def render() -> str:
    """Return the text of docs/keys.md."""
    schema = build_schema()
    sections = schema["$defs"]
    paths: dict[str, str] = {}  # the first path that leads to each section
    ours = list(_walk("giantdet", {"$ref": f"{REF}GiantdetConfig"}, sections, paths))
    outer = {name: value for name, value in schema["properties"].items() if name != "giantdet"}
    theirs = [found for name, value in outer.items() for found in _walk(name, value, sections, paths)]
    pages = [HEAD, "## The block `giantdet`\n"]
    pages += [_section(name, sections, paths) for name in ours]
    pages += [DEEPSPEED, _table({"properties": outer}, sections, paths)]
    pages += [_section(name, sections, paths) for name in theirs]
    return "\n".join(pages)


def _walk(
    path: str, value: dict[str, Any], sections: dict[str, Any], paths: dict[str, str], owner: str = ""
) -> Iterator[str]:
    """Yield the names of the sections that a value leads to, each once, and note their paths.

    `owner` is the kind of the section that has the value.
    """
    for name in _references(value):
        if name in paths:
            continue
        kind = _constant(sections[name]) or (f"in {owner}" if path in paths.values() else "")
        paths[name] = f"{path} ({kind})" if kind else path
        yield name
        for key, below in sections[name].get("properties", {}).items():
            yield from _walk(f"{path}.{key}", below, sections, paths, kind.removeprefix("type "))
        for choice in sections[name].get("allOf", []):  # the parameters of each optimizer or scheduler
            params = choice["then"]["properties"]["params"]
            title = f"{path}.params ({choice['if']['properties']['type']['const']})"
            yield from _walk(title, params, sections, paths)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"].removeprefix(REF)
        for key in ("anyOf", "oneOf", "items", "additionalProperties"):
            yield from _references(value.get(key))
    elif isinstance(value, list):
        for part in value:
            yield from _references(part)


def _constant(section: dict[str, Any]) -> str:
    """Return the value of `type` or `format` that selects this section among others; empty if none does."""
    for key in ("type", "format"):
        constant = section.get("properties", {}).get(key, {}).get("const")
        if constant:
            return f"{key} {constant}"
    return ""


def _section(name: str, sections: dict[str, Any], paths: dict[str, str]) -> str:
    path, kind = _title(paths[name].removeprefix("giantdet."))
    heading = f"### `{path}`, {kind}" if kind else f"### `{path}`"
    text = " ".join(sections[name].get("description", "").split())
    lines = [
        f'<a id="{_anchor(name)}"></a>\n',
        heading,
        "",
        text,
        "",
        _table(sections[name], sections, paths),
    ]
    return "\n".join(lines)


def _table(section: dict[str, Any], sections: dict[str, Any], paths: dict[str, str]) -> str:
    required = section.get("required", [])
    rows = ["| key | values | default | |", "|---|---|---|---|"]
    for key, value in section.get("properties", {}).items():
        default = "–" if key in required or "default" not in value else _default(value["default"])
        text = _description(value, sections)
        rows.append(f"| `{key}` | {_values(value, paths)} | {default} | {text} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else "No keys.\n"


def _description(value: dict[str, Any], sections: dict[str, Any]) -> str:
    """Return what the key does, for a table; a section is described by its docstring's first sentence."""
    text = value.get("description", "")
    if not text and "$ref" in value:
        text = sections[value["$ref"].removeprefix(REF)].get("description", "")
        text = re.split(r"(?<!et al)\. ", text)[0]
    return " ".join(text.split()).replace("|", "\\|")


def _title(path: str) -> tuple[str, str]:
    """Split a path of `_walk` into the path itself and the kind of section, which may be empty."""
    before, _, kind = path.partition(" (")
    return before, kind.removesuffix(")")


def _anchor(name: str) -> str:
    return name.lower().replace("_", "")


def _default(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "its defaults"
    text = json.dumps(value)
    return f"`{text}`" if len(text) <= LONGEST_DEFAULT else f"{len(value)} values"


def _values(value: dict[str, Any], paths: dict[str, str]) -> str:
    """Return the values that a key accepts, in words."""
    if "$ref" in value:
        name = value["$ref"].removeprefix(REF)
        kind = _title(paths[name])[1]
        return f"[{kind.split()[-1] if kind else 'section'}](#{_anchor(name)})"
    for choice in ("anyOf", "oneOf"):
        if choice in value:
            texts = [_values(part, paths) for part in value[choice]]
            if any(
                LENGTH in part.get("pattern", "") for part in value[choice]
            ):  # a number of steps or a string
                texts = ["length", *(text for text in texts if not text.startswith(("integer", "text")))]
            return " or ".join(dict.fromkeys(texts))
    if "enum" in value:
        return ", ".join(f"`{json.dumps(each)}`" for each in value["enum"])
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    kind = value.get("type")
    if isinstance(kind, list):
        return " or ".join(_values({"type": each}, paths) for each in kind)
    if kind == "array":
        return _list(value, paths)
    limits = [
        f"{sign} {value[key]:g}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in value
    ]
    words = {
        "string": "text",
        "boolean": "`true`, `false`",
        "null": "`null`",
        "object": "object",
        None: "any",
    }
    return " ".join([words.get(kind, str(kind)), " and ".join(limits)]).strip()


def _list(value: dict[str, Any], paths: dict[str, str]) -> str:
    if "prefixItems" in value:
        return "[" + ", ".join(_values(part, paths) for part in value["prefixItems"]) + "]"
    return f"list of {_values(value['items'], paths)}" if value.get("items") else "list"


if __name__ == "__main__":
    main()
