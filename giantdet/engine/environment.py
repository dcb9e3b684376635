"""What a run was started with: environment.json, one record for each start."""

from __future__ import annotations

import json
import os
import platform
import socket
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from giantdet.config.json_text import json_text
from giantdet.config.load import RunConfig
from giantdet.distributed import comm

_PACKAGES = (
    "giantdet", "torch", "torchvision", "timm", "deepspeed", "pycocotools", "hotcoco", "numpy", "pillow",
)  # fmt: skip


def record_start(run: RunConfig, device: torch.device, first_step: int, file: Path) -> None:
    """Append the record of this start to a file: time, machine, versions and the recipe as it is written.

    The records of earlier starts are kept if the run resumes. `recipe` is null for a run without a file.
    """
    before: list[dict[str, Any]] = []
    if first_step and file.is_file():
        try:
            before = json.loads(file.read_text())
        except ValueError:
            before = []
    record: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "first_step": first_step,
        "host": socket.gethostname(),
        "ranks": comm.world_size(),
        "device": describe_device(device),
        "versions": versions(),
        "recipe": None,
    }
    try:
        if run.path is not None:
            text = run.path.read_text(encoding="utf-8-sig")
            record["recipe"] = {"path": str(run.path), "content": json.loads(text)}
    except (OSError, ValueError):
        pass  # edited since the run was read from it
    file.write_text(json_text([*before, record], indent=1) + "\n")


def describe_device(device: torch.device) -> str:
    """Return the name of an accelerator, or the number of CPU cores."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).name)
    return f"CPU, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Return the versions of Python, CUDA and the packages that numbers depend on; without those missing."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = str(torch.version.cuda)
    return found
