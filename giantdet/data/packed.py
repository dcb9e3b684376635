"""A cache of packed annotations, which the processes of a node share.

Reading COCO's JSON takes half a minute and gigabytes, its packed arrays are a few hundred megabytes. So the
first process that opens a large file writes the arrays into one file, and all others map that file: they
start at once and share its pages. The processes that start meanwhile wait for the first by a lock on a file.

A cached file belongs to one version of the annotations (path, size, time of change) and of the code that
reads them. Without a folder that can be written nothing is cached, and each process reads the JSON.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from giantdet.data.records import logger

LEAST_BYTES = 32 * 2**20
"""Smaller JSON files are read in a second or two, and not cached."""
_ALIGNED = 64
_RULES = ("coco.py", "lvis.py", "reading.py", "records.py", "segments.py", "summary.py", "packed.py")


class Pack(NamedTuple):
    """Annotations as read: JSON values, and arrays. Arrays of the cache are mapped copy-on-write."""

    values: dict[str, Any]
    arrays: Mapping[str, NDArray[Any]]


class Cached:
    """The cached file of some annotations: `found` is its content or None; `store` writes it."""

    def __init__(
        self, annotations: Path, protocol: str, path: Path | None = None, found: Pack | None = None
    ) -> None:
        self._annotations, self._protocol, self._path, self.found = annotations, protocol, path, found

    def store(self, pack: Pack) -> Pack:
        """Write the pack for the other processes, in place of the packs of earlier versions.

        Returns the pack mapped from the file, so that this process shares it, too; or the pack as it is, if
        it cannot be written or the annotations have changed while they were read.
        """
        if self._path is None or _path_of(self._annotations, self._protocol) != self._path:
            return pack
        try:
            _write(self._path, pack)
        except OSError as error:
            _warn(self._path.parent, error)
            return pack
        for other in self._path.parent.glob(f"{self._path.name.split('-')[0]}-*.pack"):
            if other != self._path:
                other.unlink(missing_ok=True)
        return _read(self._path) or pack


@contextlib.contextmanager
def cached(annotations: Path, protocol: str = "coco") -> Iterator[Cached]:
    """Yield the cached pack of a file of annotations; if there is none, other processes wait until the end.

    If the first process finds the file unusable, those that have waited read it themselves. `protocol`
    is `Dataset.protocol`: a file has one pack for each protocol that it is read by.
    """
    path = _path_of(annotations, protocol)
    if path is None or (found := _read(path)) is not None:
        yield Cached(annotations, protocol, None, None if path is None else found)
        return
    lock: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.parent / f"{path.name.split('-')[0]}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        waited = not _locked(lock)
    except OSError as error:
        if lock is not None:
            os.close(lock)
        _warn(path.parent, error)
        yield Cached(annotations, protocol)
        return
    try:
        found = _read(path)
        if waited:
            os.close(lock)
            lock = None
        yield Cached(annotations, protocol, None if waited else path, found)
    finally:
        if lock is not None:
            os.close(lock)


def _locked(lock: int) -> bool:
    """Lock a file; return whether that was possible at once."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return False
    return True


def _path_of(annotations: Path, protocol: str) -> Path | None:
    """Return the file that the pack of this version of the annotations has, or None: it is not cached."""
    folder = os.environ.get("GIANTDET_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "giantdet")
    try:
        state = annotations.stat()
        name = _digest(f"{protocol} {annotations.resolve()}")
    except OSError:
        return None  # whoever reads it says what is wrong
    if not folder or state.st_size < LEAST_BYTES:
        return None
    return Path(folder) / f"{name}-{_digest(f'{state.st_size} {state.st_mtime_ns} {_rules()}')}.pack"


@functools.cache
def _rules() -> str:
    """Return a digest of the code that reads annotations: other rules give other packs."""
    here = Path(__file__).parent
    return _digest("".join((here / name).read_text(encoding="utf-8") for name in _RULES))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _write(path: Path, pack: Pack) -> None:
    """Write a file of a header in JSON, its length before it, and the arrays; all of it or nothing."""
    places, end = {}, 0
    for name, array in pack.arrays.items():
        places[name] = (array.dtype.str, array.shape, end)
        end += -(-array.nbytes // _ALIGNED) * _ALIGNED
    header = json.dumps({"values": pack.values, "arrays": places, "bytes": end}).encode()
    header += b" " * (-(len(header) + 8) % _ALIGNED)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for array in pack.arrays.values():
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                file.write(b"\0" * (-array.nbytes % _ALIGNED))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path: Path) -> Pack | None:
    """Return the content of a cached file; None if there is none, or it is not whole."""
    try:
        content = np.asarray(np.memmap(path, np.uint8, "c"))
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:start].tobytes())
        if len(content) != start + header["bytes"]:
            return None
        arrays = {}
        for name, (dtype, shape, offset) in header["arrays"].items():
            arrays[name] = np.ndarray(shape, dtype, content.data, start + offset)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Pack(header["values"], arrays)


def _warn(folder: Path, error: OSError) -> None:
    logger.warning(
        "annotations are not cached in %s (%s), so each process reads them itself; set GIANTDET_CACHE to a "
        "folder that can be written",
        folder,
        error.strerror or error,
    )
