"""What all backbones share: the interface, and the making of a timm model with clear errors."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from giantdet.config.architectures.common import BackboneConfig
from giantdet.errors import InputError
from giantdet.layers.blocks import set_stochastic_depth
from giantdet.layers.cgbn import replace_batchnorm
from giantdet.layers.norm import FrozenBatchNorm2d


class Backbone(nn.Module):
    """A timm model as a source of feature maps; `body` is the raw timm model with its own keys."""

    body: Any
    channels: tuple[int, ...]
    """Channels of each output map."""
    strides: tuple[int, ...]
    """Pixels of the image per cell of each output map."""
    mean: tuple[float, float, float]
    """What the weights expect to be subtracted from images in [0, 1]."""
    std: tuple[float, float, float]
    is_plain: bool
    """True for plain ViTs, which give one map; the FPN then builds ViTDet's simple pyramid."""
    timm_args: dict[str, Any]
    """Arguments with which `timm.create_model` made the body."""
    dropped_keys: frozenset[str]
    """Keys of timm's model that this backbone has no use for (head, final norm, class token)."""

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Normalised float images of the size given at construction to [B, C, h, w] maps, finest first."""
        raise NotImplementedError


def create_body(config: BackboneConfig, timm_args: dict[str, Any]) -> Any:
    """`timm.create_model` without classifier.

    Raises ValueError for an unknown name or tag (naming the nearest) and for arguments it does not take.
    """
    base, _, tag = config.name.partition(".")
    if not timm.is_model(base):
        nearest = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.4)
        raise InputError(f"unknown backbone '{config.name}'; nearest: {', '.join(nearest) or 'none'}")
    if tag and config.name not in (tagged := timm.list_models(base + ".*", pretrained=True)):
        raise InputError(
            f"unknown weights tag of backbone '{config.name}'; known: {', '.join(tagged) or 'none'}"
        )
    if config.drop_path_rate > 0:
        timm_args = {**timm_args, "drop_path_rate": config.drop_path_rate}
    try:
        body = timm.create_model(config.name, **timm_args)
    except TypeError as error:
        raise InputError(f"backbone '{config.name}' cannot be built with {timm_args}: {error}") from error
    set_stochastic_depth(body, config.drop_path_rate > 0)
    return body


def image_statistics(body: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation, in units of 0..1, of the weights that the name (and tag) stands for."""
    weights = body.pretrained_cfg
    mean = tuple(map(float, weights.get("mean") or timm.data.IMAGENET_DEFAULT_MEAN))
    std = tuple(map(float, weights.get("std") or timm.data.IMAGENET_DEFAULT_STD))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def checkpoint_filter(
    name: str, body: Any
) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """timm's translation of foreign checkpoints of this family, which resamples position embeddings too."""
    modules = (timm.model_entrypoint(name.partition(".")[0]).__module__, type(body).__module__)
    found = (getattr(sys.modules[m], "checkpoint_filter_fn", None) for m in modules)
    return next((fn for fn in found if fn is not None), None)


def freeze(body: nn.Module, is_frozen: Callable[[str], bool]) -> None:
    """Take the gradients of all parameters whose name `is_frozen`, and make their BatchNorms constants."""
    for name, parameter in body.named_parameters():
        if is_frozen(name):
            parameter.requires_grad_(False)
    replace_batchnorm(
        body, FrozenBatchNorm2d.from_batchnorm, lambda norm: norm.affine and not norm.weight.requires_grad
    )


def require_multiple(config: BackboneConfig, image_size: tuple[int, int], of: int) -> None:
    if image_size[0] % of or image_size[1] % of:
        raise InputError(
            f"backbone '{config.name}' needs a canvas of multiples of {of}, not "
            f"{image_size[0]}x{image_size[1]}: change data.size"
        )


def cast_to_float32(table: Tensor) -> Tensor:
    """A constant table as a buffer, outside of any graph."""
    return table.detach().to(torch.float32).clone()
