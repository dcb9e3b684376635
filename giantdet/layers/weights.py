"""Pretrained weights into a backbone, strictly: each key finds its place, or the error lists all that do not.

Loading happens before DeepSpeed partitions the model (`load_state_dict` inside `zero.Init` fails). Tensors
are cast to the parameters' type. Files are mapped, not read: of a deferred parameter's tensor (`deferred.py`)
no byte comes into memory before its turn.
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
# What timm's filters raise when they meet the tensors of something else.
_FOREIGN = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError)
_NESTS = ("state_dict", "model")


def load_backbone_weights(backbone: Backbone, config: BackboneConfig) -> None:
    """Load what `config.init_weights` (a file) or `config.pretrained` (timm's tag) names; else do nothing.

    timm's own filter of the family runs first: foreign keys are renamed, patch and position embeddings
    resampled. Head, final norm and class token, which the backbone has no use for, are left out and logged.

    Raises ValueError in one message for a missing file, one that is no checkpoint, or any mismatch of keys.
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
    what = f"{what} as backbone '{config.name}'"
    ignore = lambda key: key in backbone.dropped_keys or key.startswith(_HEADS)  # noqa: E731
    load_strictly(backbone.body, state, what, ignore)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .pth or .pt file, taken out of a `state_dict` or `model` nest.

    A folder, or an index file in one (`*.safetensors.index.json`), stands for all of its shards. Files are
    read without running code from them, and are mapped: a tensor comes into memory when it is used. Raises
    ValueError naming the file.
    """
    file = Path(path)
    if file.is_dir():
        indices = sorted(file.glob("*.safetensors.index.json"))
        files = indices or sorted(file.glob("*.safetensors"))
        if not files:
            raise InputError(f"{file}: no weights here (looked for *.safetensors)")
        if len(files) > 1:
            raise InputError(f"{file} holds {len(files)} safetensors files and no index; name one of them")
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
            mapped = zipfile.is_zipfile(file)  # older files of torch cannot be
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
    """Load `state` into `module` after `report_mismatch`; on a mismatch nothing is loaded."""
    ignored = report_mismatch(module.state_dict(), state, what, ignore)
    if ignored:
        _log.info("%s: left out %s", what, ", ".join(ignored))
    deferred = {name: p for name, p in module.named_parameters() if is_deferred(p)}
    for name, parameter in deferred.items():
        fill(parameter, state[name])
    # `num_batches_tracked`, the one key that may be missing, is what strict=False is for.
    kept = {k: v for k, v in state.items() if k not in deferred and k not in set(ignored)}
    module.load_state_dict(kept, strict=False)


def report_mismatch(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    what: str,
    ignore: Callable[[str], bool] = lambda key: False,
) -> list[str]:
    """Compare two state dicts by keys and shapes; returns the superfluous keys that `ignore` allows.

    `num_batches_tracked` may be missing (older checkpoints lack it, and nothing depends on it).
    Raises ValueError that lists the missing and unexpected keys and the shapes that differ, key by key.
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
    """What timm's configuration of a tag points to: a file, a file of the hub, or an address.

    The file alone and not timm's model with it, which would be a whole copy on every rank.
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
            raise InputError("timm knows no weights of this name")
    except Exception as error:  # no network, no disk, no such file: many libraries' own types
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
    """Those that belong to the state dict: running statistics."""
    saved = set(module.state_dict())
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}
