"""Load pretrained weights into a backbone, strictly: an error lists all keys that do not match.

Loading happens before DeepSpeed partitions the model (`load_state_dict` inside `zero.Init` fails). Tensors
are cast to the type of the parameters. Files are memory-mapped (`weight_files.py`): the tensor of a
deferred parameter (`deferred.py`) is read only when that parameter is materialised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models import load_state_dict_from_hf
from torch import Tensor, nn

from giantdet.config.architectures.common import BackboneConfig
from giantdet.errors import InputError
from giantdet.layers.body import Backbone, checkpoint_filter
from giantdet.layers.deferred import fill, is_deferred
from giantdet.layers.hub import hub
from giantdet.layers.weight_files import first_line, flatten, read_tensors
from giantdet.layers.weight_names import FOREIGN, model_tensors

_log = logging.getLogger(__name__)
_HEADS = (
    *("fc.", "head.", "head_dist.", "classifier.", "norm.", "fc_norm.", "attn_pool."),
    *("mask_token", "decoder_"),
)


def load_backbone_weights(backbone: Backbone, config: BackboneConfig) -> None:
    """Load the weights that `config.init_weights` (a file) or `config.pretrained` (timm's tag) names, if any.

    The tensors may be anywhere in the file, under any prefix (`weight_names.py`). timm's own filter of the
    model family renames the keys of other projects and resamples patch and position embeddings. Head, final
    norm and class token, which the backbone does not use, are left out and logged. Relative positions that
    the file lacks stay zero.

    Raises InputError, a ValueError, for a missing file, a file without weights, and any mismatch of keys.
    """
    if config.init_weights and config.pretrained:
        raise InputError("give either backbone.pretrained or backbone.init_weights, not both")
    if config.init_weights:
        state, what = read_tensors(config.init_weights), str(config.init_weights)
    elif config.pretrained:
        state, what = _tagged_tensors(backbone.body.pretrained_cfg, config.name), "timm's file"
    else:
        return
    if any(".fpn.inner_blocks." in key for key in state):
        raise InputError(f"{what} is a whole detector of torchvision: name it in model.init_weights instead")
    translate = checkpoint_filter(backbone.body)
    own = backbone.body.state_dict()
    expected = {key: tensor for key, tensor in own.items() if key not in backbone.added_keys}
    state = model_tensors(state, expected, translate, what)
    try:
        state = dict(translate(state))
    except FOREIGN as error:
        raise InputError(f"{what} does not look like weights of '{config.name}': {error}") from error
    state = {key: own[key] for key in backbone.added_keys} | dict(state)
    what = f"{what} as backbone '{config.name}'"
    classifier = backbone.body.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    heads = (*_HEADS, *(f"{name}." for name in heads))
    ignore = lambda key: key in backbone.dropped_keys or key.startswith(heads)  # noqa: E731
    load_strictly(backbone.body, state, what, ignore)


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
        if not state[name].is_meta:  # the own value of a key that the weights need not have
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
    kinds = {"missing": missing, "unexpected": unexpected, "with another shape": shapes}
    counts = {f"{len(keys)} {title}": keys for title, keys in kinds.items() if keys}
    if counts:
        parts = [f"  {title}:\n" + "\n".join(f"    {key}" for key in keys) for title, keys in counts.items()]
        raise InputError(f"cannot load {what}: {', '.join(counts)}\n" + "\n".join(parts))
    return ignored


def _tagged_tensors(source: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return the tensors that timm's configuration of a tag names: a file, a file of the hub, or a URL.

    Only the file is read. timm's own loading would build a whole second model on every rank.
    """
    if source.get("file"):
        return read_tensors(source["file"])
    try:
        if source.get("hf_hub_id"):
            chosen = source.get("hf_hub_filename")
            with hub():
                state = load_state_dict_from_hf(
                    source["hf_hub_id"], **({"filename": chosen} if chosen else {})
                )
        elif source.get("url"):
            state = torch.hub.load_state_dict_from_url(source["url"], map_location="cpu", weights_only=True)
        else:
            raise InputError("timm has no weights of this name")
    except Exception as error:  # no network, a full disk, a missing file: each library has its own types
        name = source.get("hf_hub_id") or name
        raise InputError(
            f"cannot get timm's weights of '{name}' ({first_line(error)}); download them elsewhere and "
            "name the file in backbone.init_weights"
        ) from error
    return flatten(state)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to the state dict, such as running statistics, by name."""
    saved = set(module.state_dict())
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}
