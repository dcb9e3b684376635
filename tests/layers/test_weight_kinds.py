"""Files and folders that are not weights: each is identified in one line that says what to do."""

from __future__ import annotations

import datetime
import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from giantdet.layers.weight_files import read_tensors


def bytes_of(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


NOT_PYTORCH = (
    "giantdet reads safetensors and PyTorch files; convert it, or look for those weights in one of them"
)
SAVE = "save those of the model: torch.save(model.state_dict(), 'weights.pth')"
KINDS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "empty": ("w.pth", lambda: b"", "is empty: copy or download it again"),
    "page": (
        "w.pth",
        lambda: b"\n<!DOCTYPE html><html><body>Sign in",
        "is a web page, not weights: download the file itself, perhaps after a login",
    ),
    "pointer": (
        "w.safetensors",
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a Git LFS pointer, not the weights: run `git lfs pull` in its repository",
    ),
    "text": ("w.pth", lambda: b"Not found", "is text, not weights: it begins with 'Not found'"),
    "JSON": ("config.json", lambda: b'{"a": 1}', "is text, not weights: it begins with '{\"a\": 1}'"),
    "HDF5": ("w.h5", lambda: b"\x89HDF\r\n\x1a\n", f"is an HDF5 file, of Keras for example: {NOT_PYTORCH}"),
    "ONNX": (
        "w.onnx",
        lambda: b"\x08\x07\x12",
        f"is a .onnx file, of TensorFlow, Flax or ONNX: {NOT_PYTORCH}",
    ),
    "Flax": ("w.msgpack", lambda: b"\x81", f"is a .msgpack file, of TensorFlow, Flax or ONNX: {NOT_PYTORCH}"),
    "TensorFlow": (
        "m.ckpt.data-00000-of-00001",
        lambda: b"\0\1",
        f"is a .data-00000-of-00001 file, of TensorFlow, Flax or ONNX: {NOT_PYTORCH}",
    ),
    "NumPy": (
        "w.npz",
        lambda: zipped("a.npy"),
        "is a NumPy archive, of JAX or Flax: convert it with torch.save(timm.create_model(NAME, "
        "checkpoint_path='w.npz').state_dict(), 'weights.pth')",
    ),
    "tar": ("w.tar.gz", tar, "is an archive: unpack it"),
    "zip": ("w.pth", lambda: zipped("weights.txt"), "is an archive: unpack it"),
    "TorchScript": (
        "w.pt",
        script,
        "is a TorchScript program: save its weights with torch.save(torch.jit.load('w.pt').state_dict(), "
        "'weights.pth')",
    ),
    "cut off": (
        "w.pth",
        lambda: bytes_of({"w": torch.ones(9999)})[:5000],
        "cannot be read: its end is missing; copy or download it again",
    ),
    "pickle of another object": (
        "model.pkl",
        lambda: pickle.dumps({"model": {"w": np.ones(2)}, "made": datetime.date(2020, 1, 1)}),
        "is not a plain file of tensors; other Python objects (datetime.date), which could run code, are not "
        "loaded: save only the weights with torch.save(model.state_dict(), 'weights.pth')",
    ),
    "pickle cut off": (
        "model.pkl",
        lambda: pickle.dumps({"model": {"w": np.ones(99)}})[:300],
        "cannot be read: pickle data was truncated",
    ),
    "no tensors": ("w.pth", lambda: bytes_of({"epoch": 3}), f"has no named tensors; {SAVE}"),
    "list": ("w.pth", lambda: bytes_of([torch.ones(1)]), f"has no named tensors; {SAVE}"),
    "whole model": (
        "w.pt",
        lambda: bytes_of({"model": torch.nn.Identity()}),
        "is not a plain file of tensors; other Python objects (torch.nn.modules.linear.Identity), which "
        "could run code, are not loaded: save only the weights with "
        "torch.save(model.state_dict(), 'weights.pth')",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_other_kind_of_file_is_identified(kind: str, tmp_path: Path) -> None:
    name, content, message = KINDS[kind]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ValueError) as raised:
        read_tensors(tmp_path / name)
    assert str(raised.value) == f"weights file {tmp_path / name} {message}"


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


ZERO = "run the checkpoint's own script, `python zero_to_fp32.py . FOLDER`, and name FOLDER"
PLACES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "run": (("config.json", "export/config.json"), "", "{0} is the folder of a run: name {0}/export"),
    "run without an export": (
        ("config.json", "checkpoints/step_1/state.json"),
        "",
        "{0} is the folder of a run: run `giantdet export {0}`, and name {0}/export",
    ),
    "checkpoint": (
        tuple(f"checkpoints/step_4/{n}" for n in ("manifest.json", "state.json", "rank_00000.safetensors")),
        "checkpoints/step_4",
        "{0}/checkpoints/step_4 is a checkpoint of giantdet: run `giantdet export {0}`, and name {0}/export",
    ),
    "checkpoints": (
        ("checkpoints/step_4/state.json",),
        "checkpoints",
        "{0}/checkpoints has the checkpoints of a run: run `giantdet export {0}`, and name {0}/export",
    ),
    "file of a checkpoint": (
        tuple(f"checkpoints/step_4/{n}" for n in ("manifest.json", "rank_00000.safetensors")),
        "checkpoints/step_4/rank_00000.safetensors",
        "{0}/checkpoints/step_4/rank_00000.safetensors is a part of a checkpoint of giantdet: run "
        "`giantdet export {0}`, and name {0}/export",
    ),
    "DeepSpeed": (
        ("latest", "zero_to_fp32.py", "global_step10/mp_rank_00_model_states.pt"),
        "",
        f"{{0}} is a checkpoint of DeepSpeed: {ZERO}",
    ),
    "file of DeepSpeed": (
        ("zero_pp_rank_0_mp_rank_00_model_states.pt",),
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        f"{{0}}/zero_pp_rank_0_mp_rank_00_model_states.pt is a part of a checkpoint of DeepSpeed: {ZERO}",
    ),
    "TensorFlow": (("checkpoint", "m.ckpt.index"), "", f"{{0}} is a checkpoint of TensorFlow: {NOT_PYTORCH}"),
    "a mistyped name": (
        ("weights.pth",),
        "weigths.pth",
        "weights file {0}/weigths.pth does not exist; did you mean weights.pth?",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_other_places_give_a_hint(place: str, tmp_path: Path) -> None:
    files, named, message = PLACES[place]
    with pytest.raises(ValueError) as raised:
        read_tensors(make(tmp_path, *files) / named)
    assert str(raised.value) == message.format(tmp_path)


def test_urls_and_hub_names_are_not_files() -> None:
    with pytest.raises(ValueError, match=r"not read from https:// addresses; download the file"):
        read_tensors("https://example.org/w.pth")
    with pytest.raises(ValueError, match=r"is a name for backbone\.name"):
        read_tensors("hf_hub:user/repository")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays_are_read(protocol: int, tmp_path: Path) -> None:
    """The layout of detectron2's zoo: arrays in nested dicts, beside strings, numbers and string arrays."""
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(3, dtype=">f8"),
        "c": np.array(7),
        "d": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        "e": np.array([True, False]),
    }
    content = {
        "model": OrderedDict(arrays),
        "__author__": "x",
        "scale": np.float64(2),
        "names": np.array(["x"]),
    }
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_tensors(tmp_path / "model.pkl")
    assert found.keys() == {f"model.{key}" for key in arrays}
    for key, array in arrays.items():
        assert found[f"model.{key}"].numpy().dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(found[f"model.{key}"].numpy(), array)


@pytest.mark.parametrize(
    "code",
    [
        b"cposix\nsystem\n(S'touch evil'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        # A dotted name under a harmless one, which protocol 4 allows.
        b"\x8c\x05numpy\x8c\x10ndarray.tofile.x\x93.",
    ],
    ids=["system", "eval", "encode", "load", "dotted"],
)
def test_pickles_with_code_are_refused_before_it_runs(code: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04" + code)
    with pytest.raises(ValueError, match="which could run code, are not loaded"):
        read_tensors(tmp_path / "model.pkl")
