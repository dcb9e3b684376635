"""Read files of weights: find out what a file is, and return its tensors without running code from it.

The content decides, not the suffix: a safetensors file may be called .pth. What cannot be read is refused
in one line that says what the file is and what to do.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from giantdet.config.names import nearest
from giantdet.errors import InputError
from giantdet.layers.pickles import ForeignObjectError, read_pickle

_log = logging.getLogger(__name__)

_NOT_PYTORCH = (
    "giantdet reads safetensors and PyTorch files; convert it, or look for those weights in one of them"
)
_KINDS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the weights: run `git lfs pull` in its repository",
    ),
    (b"\x89HDF", f"is an HDF5 file, of Keras for example: {_NOT_PYTORCH}"),
    (b"\x93NUMPY", f"is a NumPy array: {_NOT_PYTORCH}"),
    (b"GGUF", f"is a GGUF file: {_NOT_PYTORCH}"),
    *(
        (magic, "is an archive: unpack it")
        for magic in (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")
    ),
)
_SUFFIXES = re.compile(r"\.(onnx|msgpack|pb|tflite|index|meta|data-\d+-of-\d+)$")
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save before PyTorch 1.6
_TORCH = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.pth.tar")
# The names that libraries give to the weights in a folder with other files.
_USUAL = ("model.safetensors", "pytorch_model.bin")


class _NotRun:
    """Stands for every class and function that a file names: makes an empty mapping, and runs nothing.

    A Counter, because PyTorch's restricted unpickler fills its items and its attributes.
    """

    def __new__(cls, *_: Any) -> Counter[str]:  # type: ignore[misc]
        return Counter()


_HARMLESS: list[Any] = [
    *(np.dtype, np.ndarray, *(type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU")),
    *(
        (value.__reduce__()[0], f"numpy.{core}.multiarray.{name}")
        for value, name in ((np.float64(0), "scalar"), (np.zeros(0), "_reconstruct"))
        for core in ("core", "_core")
    ),
    *(
        (_NotRun, name)
        for name in (
            *("argparse.Namespace", "types.SimpleNamespace", "collections.defaultdict"),
            *("builtins.dict", "builtins.list", "builtins.int", "builtins.float"),
            *(
                "pathlib.PosixPath",
                "pathlib.PurePosixPath",
                "pathlib._local.PosixPath",
                "pathlib.WindowsPath",
            ),
            *("datetime.datetime", "datetime.date", "datetime.timedelta"),
        )
    ),
]
"""Objects that training scripts, such as timm's and Lightning's, save with the tensors: no warning."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or PyTorch file, or of a pickle of arrays, whatever its name.

    Names of nested dicts are joined with dots: `state_dict.conv1.weight`. For a folder, or an index file in
    it (`*.index.json`), the tensors of all shards are returned. No code from the files is run: objects of
    other classes are left out, with a warning that names the classes. Files are memory-mapped: a tensor is
    read when it is used.

    Raises InputError, a ValueError, that names the file, says what it is and what to do.
    """
    if found := re.match(r"(https?|s3|gs)://", str(path)):
        raise InputError(
            f"{path}: weights are not read from {found[0]} addresses; download the file and name it"
        )
    if re.match(r"hf[-_]hub:", str(path)):
        raise InputError(
            f"{path} is a name for backbone.name (and backbone.pretrained true); init_weights takes files"
        )
    try:
        file = Path(path)
        if file.is_dir():
            file = _file_in(file)
        _require_file(file)
        if not file.name.endswith(".index.json"):
            return _read_file(file)
        return {key: tensor for shard in _shards(file) for key, tensor in _read_file(shard).items()}
    except OSError as error:
        raise InputError(
            f"weights file {path} cannot be read: {error.strerror or first_line(error)}"
        ) from error


def flatten(content: Any, depth: int = 4) -> dict[str, Tensor]:
    """Return the tensors in nested dicts by their dotted names; all else is left out."""
    found: dict[str, Tensor] = {}
    for key, value in dict.items(content) if isinstance(content, dict) else ():
        if isinstance(key, str) and isinstance(value, Tensor):
            found[key] = value
        elif isinstance(key, str) and depth:
            found |= {f"{key}.{name}": tensor for name, tensor in flatten(value, depth - 1).items()}
    return found


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _require_file(file: Path) -> None:
    if not file.is_file():
        beside = [p.name for p in file.parent.iterdir() if p.is_file()] if file.parent.is_dir() else []
        raise InputError(f"weights file {file} does not exist{nearest(file.name, beside)}")
    if re.fullmatch(r"rank_\d+\.safetensors", file.name) and (file.parent / "manifest.json").is_file():
        raise InputError(f"{file} is a part of a checkpoint of giantdet: {_export_it(file.parent)}")
    if re.search(r"zero_pp_rank_\d+_.*_states\.pt$|_optim_states\.pt$", file.name):
        raise InputError(f"{file} is a part of a checkpoint of DeepSpeed: {_CONSOLIDATE}")


_CONSOLIDATE = "run the checkpoint's own script, `python zero_to_fp32.py . FOLDER`, and name FOLDER"


def _export_it(checkpoint: Path) -> str:
    run = checkpoint.parent.parent
    return f"run `giantdet export {run}`, and name {run / 'export'}"


def _file_in(folder: Path) -> Path:
    """Return the file, or index of shards, with the weights in a folder."""
    names = {path.name for path in folder.iterdir()}
    if "config.json" in names and names & {"export", "checkpoints"}:
        ready = "" if "export" in names else f"run `giantdet export {folder}`, and "
        raise InputError(f"{folder} is the folder of a run: {ready}name {folder / 'export'}")
    if {"manifest.json", "state.json"} <= names:
        raise InputError(f"{folder} is a checkpoint of giantdet: {_export_it(folder)}")
    if any(re.fullmatch(r"step_\d+", name) for name in names):
        raise InputError(f"{folder} has the checkpoints of a run: {_export_it(folder / 'step')}")
    if "zero_to_fp32.py" in names or any(re.search(r"^global_step\d+$|_model_states\.pt$", n) for n in names):
        raise InputError(f"{folder} is a checkpoint of DeepSpeed: {_CONSOLIDATE}")
    if "saved_model.pb" in names or any(name.endswith(".index") for name in names):
        raise InputError(f"{folder} is a checkpoint of TensorFlow: {_NOT_PYTORCH}")
    for patterns in (("*.safetensors.index.json",), ("*.index.json",), ("*.safetensors",), _TORCH):
        files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
        usual = [file for file in files if file.name in _USUAL]
        if len(files) > 1 and len(usual) == 1:
            _log.info("%s: of %d files of weights, %s is read", folder, len(files), usual[0].name)
            return usual[0]
        if len(files) > 1:
            listed = ", ".join(file.name for file in files[:5]) + (", ..." if len(files) > 5 else "")
            raise InputError(f"{folder} has {len(files)} files of weights ({listed}); name one of them")
        if files:
            return files[0]
    raise InputError(f"{folder}: no weights here (looked for *.safetensors, {', '.join(_TORCH)})")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        shards = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is not a safetensors index: {first_line(error)}") from error
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise InputError(f"{index.parent}: {missing[0].name} is missing, but {index.name} names it")
    return shards


def _read_file(file: Path) -> dict[str, Tensor]:
    with file.open("rb") as opened:
        head = opened.read(512)
    if (problem := _not_weights(file, head)) is not None:
        raise InputError(f"weights file {file} {problem}")
    if _is_pickle(head):
        tensors = _read_pickle(file)
    else:
        tensors = _read_safetensors(file) if _is_safetensors(file, head) else _read_torch(file, head)
    if not tensors:
        raise InputError(
            f"weights file {file} has no named tensors; save those of the model: "
            "torch.save(model.state_dict(), 'weights.pth')"
        )
    return tensors


def _not_weights(file: Path, head: bytes) -> str | None:
    """Return what a file is, and what to do, if its first bytes and its name say that it is not weights."""
    if not head:
        return "is empty: copy or download it again"
    text = head.lstrip()
    if text.lower().startswith(_PAGES):
        return "is a web page, not weights: download the file itself, perhaps after a login"
    for magic, problem in _KINDS:
        if head.startswith(magic):
            return problem
    if (suffix := _SUFFIXES.search(file.name)) is not None:
        return f"is a {suffix[0]} file, of TensorFlow, Flax or ONNX: {_NOT_PYTORCH}"
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return (
                "is a TorchScript program: save its weights with "
                f"torch.save(torch.jit.load({file.name!r}).state_dict(), 'weights.pth')"
            )
        if any(name.endswith(".npy") for name in names):
            return (
                "is a NumPy archive, of JAX or Flax: convert it with torch.save(timm.create_model(NAME, "
                f"checkpoint_path={file.name!r}).state_dict(), 'weights.pth')"
            )
        return None if any(name.endswith("data.pkl") for name in names) else "is an archive: unpack it"
    if head.startswith(b"PK\x03\x04"):
        return "cannot be read: its end is missing; copy or download it again"
    if _is_pickle(head):
        return None
    try:
        shown = text.decode()[:40]
    except UnicodeDecodeError:
        return None
    return f"is text, not weights: it begins with {shown!r}" if shown.isprintable() else None


def _is_safetensors(file: Path, head: bytes) -> bool:
    found = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 10**9
    if found and file.suffix != ".safetensors":
        _log.info("%s is a safetensors file, whatever its name, and read as such", file)
    if file.suffix == ".safetensors" and (head.startswith(_LEGACY) or zipfile.is_zipfile(file)):
        _log.info("%s is a PyTorch file, whatever its name, and read as such", file)
        return False
    return found or file.suffix == ".safetensors"


def _is_pickle(head: bytes) -> bool:
    """Return whether a file is a pickle that `torch.save` did not write, such as detectron2's zoo."""
    return re.match(rb"\x80[\x02-\x05]", head) is not None and not head.startswith(_LEGACY)


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Return the arrays of a pickle as tensors, as detectron2's zoo has them."""
    try:
        return flatten(read_pickle(file))
    except ForeignObjectError as error:
        raise InputError(_refusal(file, {str(error)})) from error
    except Exception as error:  # whatever a damaged pickle raises
        raise InputError(f"weights file {file} cannot be read: {first_line(error)}") from error


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise InputError(f"weights file {file} cannot be read: {first_line(error)}") from error


def _read_torch(file: Path, head: bytes) -> dict[str, Tensor]:
    """Return the tensors that `torch.save` wrote, of zip files without those classes that are not known."""
    is_zip = not head.startswith(_LEGACY) and zipfile.is_zipfile(file)
    # The older format cannot be mapped, and torch.load reads a path that ends in .safetensors as such a file.
    mapped = is_zip and file.suffix != ".safetensors"
    foreign: set[str] = set()
    try:
        with torch.serialization.safe_globals(_HARMLESS), ExitStack() as opened:
            if is_zip:
                foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
            opened.enter_context(torch.serialization.safe_globals([(_NotRun, name) for name in foreign]))
            source = file if mapped else opened.enter_context(file.open("rb"))
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
        tensors = flatten(content)
    except (RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"weights file {file} cannot be read: {first_line(error)}") from error
    except Exception as error:  # pickle.UnpicklingError and whatever else a damaged pickle raises
        foreign |= set(re.findall(r"GLOBAL (\S+)", str(error)))
        raise InputError(_refusal(file, foreign)) from error
    if foreign and not tensors:
        raise InputError(_refusal(file, foreign))
    if foreign:
        _log.warning(
            "%s: left out objects that are not tensors, without running code: %s", file, _listed(foreign)
        )
    return tensors


def _refusal(file: Path, foreign: set[str]) -> str:
    what = f" ({_listed(foreign)})" if foreign else ""
    return (
        f"weights file {file} is not a plain file of tensors; other Python objects{what}, which could run "
        "code, are not loaded: save only the weights with torch.save(model.state_dict(), 'weights.pth')"
    )


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
