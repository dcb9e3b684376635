"""Names of timm models that come with a source: `hf-hub:timm/resnet50.a1_in1k`,
`local-dir:/path/of/a/folder`.

A source has a config.json with the architecture, its arguments and the statistics of images. They replace
the name, so that what is saved (the resolved run, an export) can be built again without the source.
"""

from __future__ import annotations

import json
import logging
import os
import re

import timm
from timm.models import load_model_config_from_hf
from timm.models._hub import load_model_config_from_path

from giantdet.config.architectures.common import BackboneConfig
from giantdet.config.timm_args import OWNED
from giantdet.errors import InputError
from giantdet.layers.hub import hub

_log = logging.getLogger(__name__)

_SOURCE = re.compile(r"(hf[-_]hub|local-dir):(.*)", re.IGNORECASE)
# Of timm's configuration of weights, what a backbone is built with, and where the weights are.
_STATISTICS = ("architecture", "input_size", "fixed_input_size", "mean", "std")
_PLACES = ("hf_hub_id", "hf_hub_filename", "file", "url", "source")


def with_timm_name(config: BackboneConfig) -> BackboneConfig:
    """Return the section with timm's own name for a model that is named with its source; others unchanged.

    `hf-hub:timm/NAME.TAG`, and `timm/NAME.TAG`, are timm's own NAME.TAG, without a question to the hub. For
    other sources, config.json is read, on every rank: its architecture is the name, its arguments become
    `timm_args` (those of the section go first, and those that giantdet sets are left out), and its
    `pretrained_cfg` is one of them. The name of a saved section has no source, so nothing is read for it.

    Raises InputError, a ValueError, where the source cannot be reached or has no model of timm.
    """
    named = _SOURCE.fullmatch(config.name)
    if named is not None and not (config.pretrained or config.init_weights):
        _log.warning(
            "the weights of backbone.name %s are not loaded: backbone.pretrained is false", config.name
        )
    own = re.fullmatch(r"(?:hf[-_]hub:)?timm/([^/@]+)", config.name, re.IGNORECASE)
    if own is not None and own[1] in timm.list_models(own[1].partition(".")[0] + ".*", pretrained=True):
        return config.model_copy(update={"name": own[1]})
    if named is None:
        return config
    try:
        if named[1].lower() == "local-dir":
            weights, name, args = load_model_config_from_path(os.path.expanduser(named[2]))
        else:
            with hub():
                weights, name, args = load_model_config_from_hf(named[2])
    except Exception as error:  # no network, a missing file, a config.json of another library
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(
            f"backbone.name: cannot get config.json of '{config.name}' ({reason[:200]}); download the model "
            "elsewhere and name its folder as local-dir:FOLDER"
        ) from error
    if not timm.is_model(name):
        raise InputError(
            f"backbone.name: '{config.name}' is of the architecture '{name}', which timm does not have"
        )
    dropped = {key: value for key, value in args.items() if key in OWNED}
    _log.info(
        "%s is %s with %s; giantdet sets %s itself", config.name, name, args or "{}", dropped or "no argument"
    )
    kept = {key: value for key, value in args.items() if key not in OWNED}
    kept["pretrained_cfg"] = {key: weights[key] for key in (*_STATISTICS, *_PLACES) if key in weights}
    kept = json.loads(json.dumps(kept))  # lists for tuples, as a saved section is read again
    return config.model_copy(update={"name": name, "timm_args": kept | config.timm_args})


def without_source(config: BackboneConfig) -> BackboneConfig:
    """Return the section without the places of weights that `with_timm_name` has put into `timm_args`."""
    if not isinstance(weights := config.timm_args.get("pretrained_cfg"), dict):
        return config
    kept = {key: value for key, value in weights.items() if key not in _PLACES}
    return config.model_copy(update={"timm_args": config.timm_args | {"pretrained_cfg": kept}})
