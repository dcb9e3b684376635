"""The existing file that a wrong file name probably means, for error messages."""

from __future__ import annotations

import functools
import itertools
import os
import unicodedata
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

_MAX_FOLDERS = 50  # sub-folders and neighbours that are searched


def near_file(folder: Path, name: str) -> Path | None:
    """Return the file in or near `folder` that `name` probably means, or None.

    Tried in this order: back slashes, percent signs, accents and case written otherwise; leading folders left
    out; another ending; the sub-folders of `folder` and the folders beside it.
    """
    parts = _key(name).strip("/").split("/")
    for start in range(len(parts)):
        if found := _descend(folder, parts[start:]):
            return found
    last = parts[-1]
    for place in itertools.chain([folder], _neighbours(folder)):
        if found := _descend(place, [last]):
            return found
    stem = os.path.splitext(last)[0]
    return _same_stem(folder, [*parts[:-1], stem]) or _same_stem(folder, [stem])


def hint(folder: Path, path: Path) -> str:
    """Return the end of a message about a missing file of `folder`: the file it probably means, or ""."""
    near = near_file(folder, os.path.relpath(path, folder))
    if near is None:
        return ""
    same = unicodedata.normalize("NFC", str(near)) == unicodedata.normalize("NFC", str(path))
    how = " (its accents are encoded in another Unicode form)" if same else ""
    return f"; did you mean {near}{how}?"


def _key(name: str) -> str:
    """Return a name in the form in which names are compared."""
    plain = unicodedata.normalize("NFC", urllib.parse.unquote(name.replace("\\", "/")))
    return unicodedata.normalize("NFC", plain.casefold())


@functools.lru_cache(maxsize=64)
def _entries(folder: Path) -> dict[str, str]:
    """Return the names in a folder by their keys; none if it cannot be read."""
    try:
        return {_key(name): name for name in sorted(os.listdir(folder), reverse=True)}
    except OSError:
        return {}


def _descend(folder: Path, parts: Sequence[str]) -> Path | None:
    """Return the file at a path of keys below `folder`, or None."""
    for part in parts:
        name = _entries(folder).get(part)
        if name is None:
            return None
        folder = folder / name
    return folder if folder.is_file() else None


def _same_stem(folder: Path, parts: Sequence[str]) -> Path | None:
    """Return a file that differs from a path of keys in its ending alone, or None."""
    for part in parts[:-1]:
        folder = folder / _entries(folder).get(part, part)
    names = (name for key, name in _entries(folder).items() if os.path.splitext(key)[0] == parts[-1])
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _neighbours(folder: Path) -> Iterator[Path]:
    """Yield the sub-folders of a folder, and the folders beside it with theirs."""
    beside = folder.absolute().parent
    yield from itertools.islice(_folders(folder), _MAX_FOLDERS)
    for place in itertools.islice(_folders(beside), _MAX_FOLDERS):
        yield place
        yield from itertools.islice(_folders(place), _MAX_FOLDERS)


def _folders(folder: Path) -> Iterator[Path]:
    return (folder / name for name in _entries(folder).values() if (folder / name).is_dir())
