"""The command `configs`: list the recipes of a folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from giantdet.commands.arguments import as_path
from giantdet.errors import InputError


def add(subparsers: Any) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser("configs", help="list the recipes")
    parser.add_argument("folder", nargs="?", type=as_path, help="folder; default: giantdet's own recipes")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    from giantdet.config.recipes import RECIPES

    folder = options.folder or (Path("ds_configs") if Path("ds_configs").is_dir() else RECIPES)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the folder of the recipes")
    for path in sorted(folder.glob("*.json")):
        try:
            about = json.loads(path.read_text()).get("about", "")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
            about = "(not a JSON object)"
        text = about.get("what", "") if isinstance(about, dict) else about
        print(f"{path}: {text}")
