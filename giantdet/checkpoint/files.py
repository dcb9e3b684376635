"""Checkpoints on disk: files, manifest, detection of damage, reading of tensors.

    step_N/
      rank_00000.safetensors ...  what only this rank holds: fragments [first, last) of flattened tensors, as
                                  KIND/PARAMETER (weight, exp_avg, ..., ema, buffer), `first` in the metadata
      state.json                  counters, parameter groups, AGVM, shapes: small and equal on all ranks
      manifest.json               size and CRC-32 of each file, and of itself; written last

A folder gets its name when all of it is on disk (`saver.py`); until then its name ends in `.partial`.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from giantdet import __version__
from giantdet.errors import InputError

FORMAT = 1
MANIFEST, STATE, PARTIAL = "manifest.json", "state.json", ".partial"
_NAME = re.compile(r"step_\d+(\.replaced)?")
_CHUNK = 2**24  # bytes
_UMASK = os.umask(0o022)  # it can only be read by setting it
os.umask(_UMASK)


# Writing. All functions raise OSError with the file's name.


def write_tensors(path: Path, tensors: dict[str, Tensor], firsts: dict[str, int]) -> None:
    try:
        save_file(tensors, path, metadata={key: str(first) for key, first in firsts.items()})
        share(path)
    except SafetensorError as error:  # has the system's error number only in its text
        number = re.search(r"os error (\d+)", str(error))
        reason = str(error) if number is None else os.strerror(int(number[1]))
        raise OSError(int(number[1]) if number else 0, reason, str(path)) from error
    sync(path)


def share(path: Path) -> None:
    """Give a file the permissions of any new file; those of safetensors are for their owner only."""
    path.chmod(0o666 & ~_UMASK)


def write_text(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def describe_file(path: Path) -> dict[str, Any]:
    """Return the manifest's entry of a file: size and checksum."""
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": size, "crc32": f"{checksum:08x}"}


def manifest_text(content: dict[str, Any]) -> str:
    """Return the text of the manifest: `content` and its checksum."""
    inner = {key: value for key, value in content.items() if key != "crc32"}
    checksum = zlib.crc32(json.dumps(inner).encode())
    return json.dumps(inner | {"crc32": f"{checksum:08x}"}, indent=1) + "\n"


# Reading


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint. Raises ValueError if it is missing or has changed."""
    try:
        text = (folder / MANIFEST).read_bytes().decode()
        content: dict[str, Any] = json.loads(text)
        if manifest_text(content) == text:
            return content
    except FileNotFoundError:
        raise InputError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise InputError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, AttributeError):
        pass
    raise InputError(f"{MANIFEST} is damaged")


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Return what is wrong with a checkpoint, by its manifest; [] if nothing is.

    Each of `parts` callers checks its share of the files. Raises ValueError for a checkpoint of an earlier
    version.
    """
    if list(folder.glob("*_model_states.pt")) and not (folder / MANIFEST).exists():
        raise InputError(
            f"{folder}: saved by an earlier giantdet in DeepSpeed's own files, which giantdet {__version__} "
            "does not read; give another train.output, or start from the beginning with train.resume=false"
        )
    try:
        files = read_manifest(folder)["files"]
    except ValueError as error:
        return [str(error)] if part == 0 else []
    found = []
    for name in sorted(files)[part::parts]:
        try:
            now = describe_file(folder / name)
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
        else:
            if now["bytes"] != files[name]["bytes"]:
                found.append(f"{name} has {now['bytes']} bytes of {files[name]['bytes']}")
            elif now != files[name]:
                found.append(f"{name} has changed since it was written (checksum)")
    return found


def scan(folder: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    """Return the checkpoints in `folder` with their manifests, sorted by the images they have seen.

    Those without a readable manifest come last, with None.
    """
    found: list[tuple[Path, dict[str, Any] | None]] = []
    for path in folder.glob("step_*"):
        if _NAME.fullmatch(path.name):
            try:
                found.append((path, read_manifest(path)))
            except ValueError:
                found.append((path, None))
    return sorted(
        found, key=lambda pair: (pair[1] is None, pair[1]["images"] if pair[1] else 0, pair[0].name)
    )


def newest(folder: Path) -> Path:
    """Return the newest checkpoint without damage. Raises ValueError if there is none."""
    problems = []
    for path, _ in reversed(scan(folder)):
        if not (found := damage(path)):
            return Path(path)
        problems.append(f"{path.name}: {', '.join(found)}")
    raise InputError(f"{folder}: no complete checkpoint here: {'; '.join(problems) or 'no step_N folder'}")


class SavedTensors:
    """A checkpoint's tensors, read slice by slice from the files of all ranks that wrote it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / STATE).read_text())
        if self.state["format"] != FORMAT:
            raise InputError(
                f"{folder}: has format {self.state['format']}; giantdet {__version__} reads only {FORMAT}"
            )
        self._pieces: dict[str, list[tuple[int, Any]]] = {}
        for name in sorted(read_manifest(folder)["files"]):
            if name != STATE:
                file: Any = safe_open(folder / name, "pt")
                firsts = file.metadata() or {}
                for key in file.keys():  # noqa: SIM118 (safetensors' files are not dicts)
                    self._pieces.setdefault(key, []).append((int(firsts.get(key, 0)), file))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])
        self.kinds: dict[str, set[str]] = {}
        for key in self._pieces:
            kind, name = key.split("/", 1)
            self.kinds.setdefault(name, set()).add(kind)

    def has(self, kind: str, name: str) -> bool:
        return kind in self.kinds.get(name, ())

    def whole(self, kind: str, name: str) -> Tensor:
        """Return a tensor that one rank wrote whole: a single value."""
        tensor: Tensor = self._pieces[f"{kind}/{name}"][0][1].get_tensor(f"{kind}/{name}")
        return tensor

    def buffer(self, name: str, rank: int | None = None) -> Tensor:
        """Return a buffer as `rank` wrote it; without a rank, the mean over all ranks."""
        every: list[Tensor] = [
            file.get_tensor(f"buffer/{name}") for _, file in self._pieces[f"buffer/{name}"]
        ]
        if rank is not None or not every[0].is_floating_point():
            return every[rank or 0]
        return (torch.stack(every).double().sum(0) / len(every)).to(every[0].dtype)

    def read(self, kind: str, name: str, first: int, last: int) -> Tensor:
        """Return elements [first, last) of a flattened tensor. Raises ValueError if some are missing."""
        key = f"{kind}/{name}"
        pieces = self._pieces.get(key, [])
        parts, position = [], first
        for begin, file in pieces[max(0, bisect_right(pieces, first, key=lambda piece: piece[0]) - 1) :]:
            if position >= last or begin > position:
                break
            part = file.get_slice(key)[position - begin : last - begin]
            parts.append(part)
            position += len(part)
        if position != last:
            raise InputError(
                f"{self.folder}: elements {position} to {last} of the {kind} of {name} are missing"
            )
        return torch.cat(parts) if parts else torch.empty(0)
