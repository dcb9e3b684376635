"""Read the JSON and XML files of other formats, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from giantdet.data.importing.scene import Notes, Request, read_text
from giantdet.errors import DataError


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises DataError."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def read_xml(path: Path) -> ElementTree.Element:
    """Return the root of an XML file. Raises DataError.

    Entities are refused: annotations have none, and a few of them can expand to gigabytes.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if b"<!ENTITY" in content:
        raise DataError(f"{path} defines XML entities, which annotations do not need")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # also unknown encodings
        raise DataError(f"{path} is not valid XML: {error}") from error


def files(request: Request, ending: str) -> list[Path]:
    """Return the source, or the files with this ending in it and its sub-folders. Raises DataError."""
    if request.source.is_file():
        return [request.source]
    found = sorted(path for path in request.source.rglob(f"*{ending}") if path.is_file())
    if not found:
        raise DataError(f"{request.source} has no {ending} file")
    return found


def name_in(request: Request, path: Path) -> str:
    """Return the path of a file below the source, for messages."""
    return str(path.relative_to(request.folder)) if path.is_relative_to(request.folder) else str(path)


def roots(request: Request, ending: str, notes: Notes, reader: Any) -> Iterator[tuple[Path, str, Any]]:
    """Yield each file of the source with its name and content; unreadable ones are counted and left out."""
    for path in files(request, ending):
        where = name_in(request, path)
        try:
            content = reader(path)
        except DataError as error:
            notes.skip("unreadable file", where, str(error))
        else:
            yield path, where, content
