"""Load pretrained weights into a backbone, strictly: an error lists all keys that do not match.

Loading happens before DeepSpeed partitions the model (`load_state_dict` inside `zero.Init` fails). Tensors
are cast to the type of the parameters. Files are memory-mapped: the tensor of a deferred parameter
(`deferred.py`) is read only when that parameter is materialised.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import load_state_dict_from_hf
from torch import Tensor, nn

from giantdet.config.architectures.common import BackboneConfig
from giantdet.errors import InputError
from giantdet.layers.body import Backbone, checkpoint_filter
from giantdet.layers.deferred import fill, is_deferred

_log = logging.getLogger(__name__)
_HEADS = ("fc.", "head.", "head_dist.", "classifier.", "fc_norm.", "attn_pool.", "mask_token")
# What timm's filters raise for the tensors of another model.
_FOREIGN = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError)
_NESTS = ("state_dict", "model")


def load_backbone_weights(backbone: Backbone, config: BackboneConfig) -> None:
    """Load the weights that `config.init_weights` (a file) or `config.pretrained` (timm's tag) names, if any.

    timm's own filter of the model family runs first: it renames the keys of other projects and resamples
    patch and position embeddings. Head, final norm and class token, which the backbone does not use, are left
    out and logged. Relative positions that the file lacks stay zero.

    Raises InputError, a ValueError, for a missing file, a file without weights, and any mismatch of keys.
    """
    if config.init_weights and config.pretrained:
        raise InputError("give either backbone.pretrained or backbone.init_weights, not both")
    if config.init_weights:
        state, what = read_state_dict(config.init_weights), str(config.init_weights)
    elif config.pretrained:
        state, what = _tagged_state_dict(backbone.body.pretrained_cfg, config.name), "timm's file"
    else:
        return
    translate = checkpoint_filter(config.name, backbone.body)
    if translate is not None:
        try:
            state = translate(state, backbone.body)
        except _FOREIGN as error:
            raise InputError(f"{what} does not look like weights of '{config.name}': {error}") from error
    own = backbone.body.state_dict()
    state = {key: own[key] for key in backbone.added_keys} | dict(state)
    what = f"{what} as backbone '{config.name}'"
    ignore = lambda key: key in backbone.dropped_keys or key.startswith(_HEADS)  # noqa: E731
    load_strictly(backbone.body, state, what, ignore)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors, .pth or .pt file by name.

    They may be at the top level of the file, or under a key `state_dict` or `model`. For a folder, or an
    index file in it (`*.safetensors.index.json`), the tensors of all shards are returned. No code from the
    files is run. Files are memory-mapped: a tensor is read when it is used.

    Raises InputError, a ValueError, that names the file.
    """
    file = Path(path)
    if file.is_dir():
        indices = sorted(file.glob("*.safetensors.index.json"))
        files = indices or sorted(file.glob("*.safetensors"))
        if not files:
            raise InputError(f"{file}: no weights here (looked for *.safetensors)")
        if len(files) > 1:
            raise InputError(f"{file} has {len(files)} safetensors files and no index; name one of the files")
        file = files[0]
    if not file.is_file():
        raise InputError(f"weights file {file} does not exist")
    if file.name.endswith(".index.json"):
        try:
            names = sorted(set(json.loads(file.read_text())["weight_map"].values()))
            shards = [file.parent / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{file} is no index of safetensors: {_first_line(error)}") from error
        if missing := [shard for shard in shards if not shard.is_file()]:
            raise InputError(f"{file.parent}: {missing[0].name} is missing, which {file.name} names")
        return {key: tensor for shard in shards for key, tensor in _read_file(shard).items()}
    return _read_file(file)


def _read_file(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise InputError(f"weights file {file} does not exist")
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            mapped = zipfile.is_zipfile(file)  # torch's older format cannot be memory-mapped
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(f"weights file {file} cannot be read: {_first_line(error)}") from error
    except Exception as error:  # pickle.UnpicklingError and whatever else a damaged pickle raises
        raise InputError(
            f"weights file {file} is no plain file of tensors; other Python objects, which could run code, "
            "are not loaded: save a state_dict"
        ) from error
    for nest in _NESTS:
        if isinstance(state, Mapping) and isinstance(state.get(nest), Mapping):
            state = state[nest]
    pairs = state.items() if isinstance(state, Mapping) else ()
    tensors = {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise InputError(f"weights file {file} holds no tensors at its top, in 'state_dict' or in 'model'")
    if all(key.startswith("module.") for key in tensors):  # saved from DistributedDataParallel
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    what: str,
    ignore: Callable[[str], bool] = lambda key: False,
) -> None:
    """Load `state` into `module`. Raises InputError (`report_mismatch`) before anything is loaded."""
    ignored = report_mismatch(module.state_dict(), state, what, ignore)
    if ignored:
        _log.info("%s: left out %s", what, ", ".join(ignored))
    deferred = {name: p for name, p in module.named_parameters() if is_deferred(p)}
    for name, parameter in deferred.items():
        fill(parameter, state[name])
    # strict=False because of `num_batches_tracked`, the only key that may be missing.
    kept = {k: v for k, v in state.items() if k not in deferred and k not in set(ignored)}
    module.load_state_dict(kept, strict=False)


def report_mismatch(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    what: str,
    ignore: Callable[[str], bool] = lambda key: False,
) -> list[str]:
    """Compare two state dicts by keys and shapes; return the superfluous keys that `ignore` allows.

    `num_batches_tracked` may be missing (older checkpoints lack it, and nothing depends on it). Raises
    InputError, a ValueError, that lists all missing and unexpected keys and all shapes that differ.
    """
    missing = [k for k in expected if k not in found and not k.endswith("num_batches_tracked")]
    extra = [k for k in found if k not in expected]
    ignored = [k for k in extra if ignore(k)]
    unexpected = [k for k in extra if not ignore(k)]
    shapes = [
        f"{k}: {_shape(found[k])} in the weights, {_shape(expected[k])} in the model"
        for k in found
        if k in expected and found[k].shape != expected[k].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    counts = {f"{len(keys)} {title}": keys for title, keys in kinds.items() if keys}
    if counts:
        parts = [f"  {title}:\n" + "\n".join(f"    {key}" for key in keys) for title, keys in counts.items()]
        raise InputError(f"cannot load {what}: {', '.join(counts)}\n" + "\n".join(parts))
    return ignored


def _tagged_state_dict(source: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return the weights that timm's configuration of a tag names: a file, a file of the hub, or a URL.

    Only the file is read. timm's own loading would build a whole second model on every rank.
    """
    try:
        if source.get("file"):
            return read_state_dict(source["file"])
        if source.get("hf_hub_id"):
            chosen = source.get("hf_hub_filename")
            state = load_state_dict_from_hf(source["hf_hub_id"], **({"filename": chosen} if chosen else {}))
        elif source.get("url"):
            state = torch.hub.load_state_dict_from_url(source["url"], map_location="cpu", weights_only=True)
        else:
            raise InputError("timm has no weights of this name")
    except Exception as error:  # no network, a full disk, a missing file: each library has its own types
        raise InputError(
            f"cannot get timm's weights of '{name}' ({_first_line(error)}); download them elsewhere and "
            "name the file in backbone.init_weights"
        ) from error
    for nest in _NESTS:
        state = state.get(nest, state)
    return dict(state)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to the state dict, such as running statistics, by name."""
    saved = set(module.state_dict())
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}
