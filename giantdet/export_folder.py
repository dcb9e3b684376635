"""Find the export that a user names: its folder, the folder of its run, or a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from giantdet.errors import InputError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_HUB = re.compile(r"hf[-_]hub:([^@]+)(?:@(.+))?", re.IGNORECASE)


def export_folder(source: str | Path) -> Path:
    """Return the folder of an export.

    `source` is that folder, the folder of a run, which has it in `export`, or `hf_hub:OWNER/NAME` or
    `hf_hub:OWNER/NAME@REVISION` for a repository of the Hugging Face hub, whose files are downloaded once.
    Raises InputError, a ValueError, for a run without an export and for what the hub does not give.
    """
    if found := _HUB.fullmatch(str(source)):
        return _downloaded(*found.groups())
    folder = Path(source).expanduser()
    is_run = (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir()
    if (folder / "export" / CONFIG).is_file() and not _has_weights(folder):
        return folder / "export"
    if is_run and not _has_weights(folder):
        raise InputError(f"{folder}: this run has no export yet; write one with: giantdet export {folder}")
    return folder


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def _downloaded(repository: str, revision: str | None) -> Path:
    try:
        files = [CONFIG, INDEX, "*.safetensors"]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except LocalEntryNotFoundError as error:
        raise InputError(f"hf_hub:{repository}: not in the cache, and the hub is not reached") from error
    except (HfHubHTTPError, HFValidationError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"hf_hub:{repository}: the hub does not give it ({first})") from error
