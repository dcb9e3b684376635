"""Frozen backbones: a check of their weights, and exports that leave them out.

A frozen backbone of billions of weights is that of timm's tag, or of a file, to the last bit. An export may
therefore leave it out (`train.export_backbone: false`) and name where it comes from. To load such an export,
the weights come from the tag (the network, or timm's cache), or from a file that the user gives.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor

from giantdet.config.architectures.common import ArchitectureConfig, BackboneConfig
from giantdet.config.section import Section
from giantdet.distributed import comm
from giantdet.errors import ConfigError, InputError
from giantdet.layers.body import Backbone
from giantdet.layers.norm import FrozenBatchNorm2d
from giantdet.layers.weights import load_backbone_weights

_log = logging.getLogger("giantdet")

PREFIX = "backbone.body."
"""Prefix of the names of the tensors that are left out; norms after the body stay in the export."""
BESIDE = "backbone.safetensors"
"""Name of the file, or of the link to it, in the folder of an export that leaves out its backbone."""


Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class LeftOut(Section):
    """Where the weights that an export leaves out come from."""

    kind: Literal["tag", "file"]
    source: str
    """timm's name with its tag, or the name of the file."""
    precision: Precision
    """The type that they were used in; they are rounded to it when they are loaded."""
    magnitude: float = 0.0
    """Sum of the magnitudes of the body's parameters in that type, to recognise other weights."""


def check_frozen(backbone: Backbone, config: ArchitectureConfig) -> None:
    """Raise ConfigError if layers of the backbone are frozen, and have random weights.

    Where the whole backbone is frozen this is a warning: a measurement of speed or memory needs no weights.
    """
    section = config.backbone
    if config.init_weights or section.init_weights or section.pretrained:
        return
    if backbone.frozen:
        if comm.is_main():
            _log.warning(
                "giantdet.model.backbone is frozen and has random weights: give pretrained or init_weights"
            )
        return
    frozen: list[tuple[str, Any]] = []
    if any(not parameter.requires_grad for parameter in backbone.parameters()):
        frozen.append(("model.backbone.frozen_stages", 0))
    if any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules()):
        frozen.append(("norm.type", "local"))
    if frozen:
        keys, instead = (" and ".join(map(str, words)) for words in zip(*frozen, strict=True))
        raise ConfigError(
            f"giantdet.model.backbone has no weights, and {keys} would freeze its random layers: "
            f"give pretrained or init_weights, or set {keys} to {instead}"
        )


def check_left_out(model: ArchitectureConfig, export_backbone: bool) -> None:
    """Raise ConfigError if exports are to leave out weights that could not be loaded again."""
    has_source = (model.backbone.pretrained or model.backbone.init_weights) and not model.init_weights
    if not (export_backbone or has_source):
        raise ConfigError(
            "giantdet.train.export_backbone false needs weights that can be loaded again: give "
            "giantdet.model.backbone.pretrained or init_weights, and not giantdet.model.init_weights"
        )


def left_out_of(config: BackboneConfig, precision: Precision) -> LeftOut:
    """Return what an export says of a backbone that has loaded its weights as its section says."""
    given = config.timm_args.get("pretrained_cfg")
    kind: Literal["tag", "file"] = "file"
    if config.init_weights:
        source = Path(config.init_weights).name
    elif isinstance(given, dict):  # of a source beside timm: `with_timm_name`
        source = next(
            (str(given[key]) for key in ("hf_hub_id", "url", "file") if given.get(key)), config.name
        )
    else:
        kind, source = "tag", full_name(config.name)
    return LeftOut(kind=kind, source=source, precision=precision)


def full_name(name: str) -> str:
    """Return a name of timm with its tag, which is that of timm's default where the name has none."""
    weights = timm.get_pretrained_cfg(name)
    tag = "" if weights is None else weights.tag
    return f"{name.partition('.')[0]}.{tag}" if tag else name


def fill_in(
    backbone: Backbone, section: BackboneConfig, left: LeftOut, what: Path, file: str | Path | None = None
) -> dict[str, Tensor]:
    """Load the weights that the export `what` leaves out into its backbone, and say so in one line.

    They are those of `file`, or of the file or link called backbone.safetensors in the folder, or those that
    `section` names (`init_weights`, `pretrained`), or those of timm's tag. Returns the backbone's own tensors
    by their names in the detector. Raises InputError, a ValueError, where none of these is there.
    """
    folder = what if what.is_dir() else what.parent
    if file is None and (folder / BESIDE).exists():
        file = folder / BESIDE
    if file is not None:
        section = section.model_copy(update={"init_weights": str(file), "pretrained": False})
    elif not (section.init_weights or section.pretrained):
        if left.kind == "file":
            raise InputError(
                f"{what} leaves out its frozen backbone, which was read from {left.source}: put that file or "
                f"a link to it into {folder} as {BESIDE}"
            )
        if full_name(section.name) != left.source:
            raise InputError(
                f"{what} leaves out its frozen backbone: set giantdet.model.backbone.name to {left.source}"
            )
        section = section.model_copy(update={"pretrained": True})
    load_backbone_weights(backbone, section)
    _log.warning(
        "%s leaves out its frozen backbone, %s: filled in from %s",
        *(what, left.source, section.init_weights or f"timm's weights of {section.name}"),
    )
    return {PREFIX + name: tensor for name, tensor in backbone.body.state_dict().items()}


@torch.no_grad()
def round_and_check(backbone: Backbone, left: LeftOut, what: Path) -> None:
    """Round the weights that were filled in to the type that training used them in.

    Raises InputError, a ValueError, where they are others than those that the export was trained with.
    """
    for parameter in backbone.body.parameters():
        parameter.copy_(parameter.to(DTYPES[left.precision]))
    found = sum(magnitude(parameter) for parameter in backbone.body.parameters())
    # Positions are resampled in float32, in other orders of sums on other machines.
    if not math.isclose(found, left.magnitude, rel_tol=1e-5):
        raise InputError(
            f"{what} was trained with other weights of its frozen backbone than these: their magnitudes sum "
            f"up to {found:.8g}, those of {left.source} to {left.magnitude:.8g}; give that file"
        )


def magnitude(tensor: Tensor) -> float:
    """Return the sum of the magnitudes of a tensor's elements, added up in float64."""
    return float(torch.linalg.vector_norm(tensor.detach(), 1, dtype=torch.float64))
