"""Weights and exports: functions of a folder to write into and an export, which return a path."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bad_inputs.cases import Case, Error


def state(export: Path, **changes: Any) -> dict[str, Any]:
    """Return the export's tensors, with one replaced or (None) removed."""
    tensors = load_file(export / "model.safetensors") | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def cut(at: int) -> Callable[[Path, Path], Path]:
    return lambda folder, export: _written(
        folder / "w.safetensors", (export / "model.safetensors").read_bytes()[:at]
    )


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _folder(path: Path) -> Path:
    (path.parent / "config.json").write_text("{}")
    path.mkdir()
    return path


def export_with(name: str, content: bytes) -> Callable[[Path, Path], Path]:
    """Copy the export and replace the content of one file."""

    def make(folder: Path, export: Path) -> Path:
        for source in export.iterdir():
            (folder / source.name).write_bytes(source.read_bytes())
        (folder / name).write_bytes(content)
        return folder

    return make


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def saved(
    change: Callable[[Path, Path], Any], name: str = "w.pth", **options: Any
) -> Callable[[Path, Path], Path]:
    """Write a torch.save file of the result of `change` on folder and export."""

    def make(folder: Path, export: Path) -> Path:
        torch.save(change(folder, export), folder / name, **options)
        return folder / name

    return make


def tensors(**changes: Any) -> Callable[[Path, Path], Path]:
    """Write a safetensors file with changed tensors; `__` in a name is a dot."""

    def make(folder: Path, export: Path) -> Path:
        renamed = {name.replace("__", "."): tensor for name, tensor in changes.items()}
        save_file(state(export, **renamed), folder / "w.safetensors")
        return folder / "w.safetensors"

    return make


_PLAIN = (
    "weights file ... is not a plain file of tensors; other Python objects (...), which could run code, ..."
)
WEIGHTS = [
    Case("no file", lambda folder, export: folder / "no.pth", Error("weights file ...no.pth does not exist")),
    Case("0 bytes", cut(0), Error("weights file ... is empty: copy or download it again")),
    Case(
        "a web page named .pth",
        lambda f, e: _written(f / "w.pth", b"<!DOCTYPE html><html>"),
        Error("weights file ... is a web page, not weights: download the file itself, perhaps after a login"),
    ),
    Case(
        "a Git LFS pointer",
        lambda f, e: _written(f / "w.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        Error("weights file ... is a Git LFS pointer, not the weights: run `git lfs pull` in its repository"),
    ),
    Case(
        "the folder of a run",
        lambda f, e: export_with("config.json", b"{}")(_folder(f / "export"), e).parent,
        Error("... is the folder of a run: name .../export"),
    ),
    Case(
        "weights of a backbone given as those of a detector",
        saved(lambda f, e: {"layer1.0.conv1.weight": torch.ones(1)}),
        Error("... has no tensor named as in mask_rcnn; ... give them in model.backbone.init_weights"),
    ),
    Case(
        "a text file named .safetensors",
        lambda f, e: _written(f / "w.safetensors", b"hello" * 9),
        Error("weights file ... is text, not weights: it begins with ..."),
    ),
    Case("safetensors cut in the header", cut(1000), Error("weights file ... cannot be read: ...")),
    Case(
        "safetensors cut in the last tensor",
        cut(-1),
        Error("weights file ... cannot be read: ...not fully covered"),
    ),
    Case(
        "a .pth cut off",
        lambda f, e: _written(f / "w.pth", saved(lambda f, e: state(e))(f, e).read_bytes()[:5000]),
        Error("weights file ... cannot be read: its end is missing; copy or download it again"),
    ),
    Case("a pickle with code in it", saved(lambda f, e: {"w": Evil(f / "evil")}), Error(_PLAIN)),
    Case(
        "an old pickle with code in it",
        saved(lambda f, e: {"w": Evil(f / "evil")}, _use_new_zipfile_serialization=False),
        Error(_PLAIN),
    ),
    Case(
        "a bare pickle with code in it",
        lambda f, e: _written(f / "w.pkl", pickle.dumps(Evil(f / "evil"))),
        Error(_PLAIN),
    ),
    Case(
        "a list, or other objects",
        saved(lambda f, e: [1, 2]),
        Error("weights file ... has no named tensors; save those of the model: ..."),
    ),
    Case(
        "a wrong shape",
        tensors(fpn__outputs__0__0__weight=torch.ones(3)),
        Error("cannot load ...w.safetensors: 1 with another shape"),
    ),
    Case(
        "a missing tensor",
        tensors(fpn__outputs__0__0__weight=None),
        Error("cannot load ...w.safetensors: 1 missing"),
    ),
    Case(
        "an additional tensor",
        tensors(other=torch.ones(3)),
        Error("cannot load ...w.safetensors: 1 unexpected"),
    ),
    Case(
        "a folder without weights",
        lambda folder, export: folder,
        Error("...: no weights here (looked for *.safetensors, *.bin, *.pth, *.pt, *.ckpt, *.pth.tar)"),
    ),
    Case(
        "an index that is not JSON",
        export_with("model.safetensors.index.json", b"{"),
        Error("... is not a safetensors index: ..."),
    ),
    Case(
        "an index that names a missing shard",
        export_with("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}'),
        Error("b.safetensors is missing, but model.safetensors.index.json names it"),
    ),
]
EXPORTS = [
    Case(
        "no config.json",
        lambda folder, export: folder,
        Error("...: not a giantdet export (no config.json)"),
    ),
    Case(
        "a config.json of 0 bytes",
        export_with("config.json", b""),
        Error("config.json: not from a giantdet export (Invalid JSON: ..."),
    ),
    Case(
        "a config.json of Hugging Face",
        export_with("config.json", b'{"model_type": "vit"}'),
        Error("config.json: not from a giantdet export (model: Field required)"),
    ),
    Case(
        "a config.json in UTF-16",
        export_with("config.json", "{}".encode("utf-16")),
        Error("config.json: cannot be read ..."),
    ),
    Case(
        "a model.safetensors cut off",
        export_with("model.safetensors", b"\x10\0\0\0\0\0\0\0{"),
        Error("weights file ...model.safetensors cannot be read: ..."),
    ),
    Case(
        "a missing shard",
        export_with("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}'),
        Error("b.safetensors is missing, but model.safetensors.index.json names it"),
    ),
]
