"""Read pickles of NumPy arrays, as of detectron2's model zoo, without running code from them.

A pickle names classes and functions and calls them with arguments of its choice. Here only those that NumPy
writes for its arrays can be named, and `OrderedDict`; none of them runs code of its arguments.
"""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

_ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(module, "_reconstruct"): np.zeros(0).__reduce__()[0] for module in _ARRAYS},
    **{(module, "scalar"): np.float64(0).__reduce__()[0] for module in _ARRAYS},
    **{
        (module, "_frombuffer"): np.zeros(0).__reduce_ex__(5)[0]
        for module in ("numpy.core.numeric", "numpy._core.numeric")
    },
}


class ForeignObjectError(pickle.UnpicklingError):
    """A pickle that names another class or function than those of arrays; the text is that name."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # bytes in the older protocols
            return _latin1
        if (module, name) not in _ALLOWED:
            raise ForeignObjectError(f"{module}.{name}")
        return _ALLOWED[module, name]


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ForeignObjectError(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


def read_pickle(file: Path) -> Any:
    """Return what a pickle of dicts, lists, numbers, texts and NumPy arrays holds; arrays become tensors.

    Arrays of texts or objects are left out. Raises ForeignObjectError, or what the unpickler raises for a
    damaged file.
    """
    with file.open("rb") as opened:
        return _with_tensors(_Reader(opened, encoding="latin1").load())


def _with_tensors(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _with_tensors(value) for key, value in content.items()}
    if isinstance(content, np.ndarray) and content.dtype.kind in "biuf":
        array = np.require(content, content.dtype.newbyteorder("="), ["C", "W"])
        return torch.from_numpy(array)
    return None
