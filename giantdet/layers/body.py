"""The interface of all backbones, and the construction of their timm models with clear errors."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Self

import timm
import torch
from torch import Tensor, nn

from giantdet.config.architectures.common import BackboneConfig
from giantdet.errors import InputError
from giantdet.layers.blocks import set_stochastic_depth
from giantdet.layers.cgbn import replace_batchnorm
from giantdet.layers.families import family_of
from giantdet.layers.norm import FrozenBatchNorm2d


class Backbone(nn.Module):
    """A timm model that returns feature maps; `body` is the raw timm model with its own parameter names."""

    body: Any
    channels: tuple[int, ...]
    """Channels of each output map."""
    strides: tuple[int, ...]
    """Stride of each output map, in pixels of the image."""
    mean: tuple[float, float, float]
    """Mean by channel that the weights expect to be subtracted from images in [0, 1]."""
    std: tuple[float, float, float]
    is_plain: bool
    """True for plain ViTs, which return one map; the FPN then builds ViTDet's simple pyramid."""
    timm_args: dict[str, Any]
    """Arguments with which `timm.create_model` made the body."""
    dropped_keys: frozenset[str]
    """Keys of timm's model that this backbone does not use (head, final norm, class token)."""
    added_keys: frozenset[str] = frozenset()
    """Keys of the body that timm's model does not have; checkpoints may lack them."""

    one_size: str = ""
    """The reason why the model takes images of one size only; empty if it takes others (`set_canvas`)."""
    frozen: bool = False
    """True after `freeze_all`."""

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Return `[B, C, h, w]` maps, finest first, of normalised float images of the canvas' size."""
        if not self.frozen:
            return self.maps(images_B3HW)
        with torch.no_grad():
            return self.maps(images_B3HW)

    def maps(self, images_B3HW: Tensor) -> list[Tensor]:
        """Return what `forward` returns, with a graph wherever gradients are enabled."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts; a frozen backbone stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def freeze_all(self) -> None:
        """Freeze the whole backbone: no gradients, no graph, and evaluation mode from now on.

        Its batch norms become constants, whatever the `norm` block says. The norms of the levels, which
        some families have after the body, are frozen too: a 1x1 convolution of the pyramid follows them,
        which scale and bias can be folded into.
        """
        self.frozen = True
        self.requires_grad_(False)
        replace_batchnorm(self, FrozenBatchNorm2d.from_batchnorm)
        self.train()

    def set_canvas(self, image_size: tuple[int, int]) -> None:
        """Take images of another (height, width) in pixels, multiples of the largest stride, from now on.

        Not for a model of `one_size`.
        """
        raise NotImplementedError


def check_name(name: str) -> None:
    """Raise InputError, a ValueError, with suggestions for the name or the tag of a model that timm lacks."""
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise InputError(f"unknown backbone '{name}'; nearest: {', '.join(_nearest(base)) or 'none'}")
    if tag and name not in (tagged := timm.list_models(base + ".*", pretrained=True)):
        raise InputError(f"unknown weights tag of backbone '{name}'; known: {', '.join(tagged) or 'none'}")


def _nearest(name: str) -> list[str]:
    """Return models with weights whose names begin with `name`, and models with similar names."""
    name = name.lower().replace("-", "_")
    weights = {full.partition(".")[0] for full in timm.list_models(pretrained=True)}
    longer = sorted((known for known in weights if known.startswith(name)), key=lambda n: (len(n), n))
    similar = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
    return list(dict.fromkeys(longer[:5] + similar))[:5]


def create_body(config: BackboneConfig, timm_args: dict[str, Any]) -> Any:
    """Return a model of `timm.create_model`, with the stochastic depth of `config`.

    Raises InputError, a ValueError, for an unknown name or tag (with suggestions), and for arguments that the
    model does not accept.
    """
    check_name(config.name)
    if config.drop_path_rate > 0:
        timm_args = {**timm_args, "drop_path_rate": config.drop_path_rate}
    try:
        body = timm.create_model(config.name, **timm_args)
    except TypeError as error:
        raise InputError(f"backbone '{config.name}' cannot be built with {timm_args}: {error}") from error
    set_stochastic_depth(body, config.drop_path_rate > 0)
    return body


def image_statistics(body: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the mean and standard deviation by channel, of images in [0, 1], that the weights expect."""
    weights = body.pretrained_cfg
    mean = tuple(map(float, weights.get("mean") or timm.data.IMAGENET_DEFAULT_MEAN))
    std = tuple(map(float, weights.get("std") or timm.data.IMAGENET_DEFAULT_STD))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def checkpoint_filter(body: Any) -> Callable[[dict[str, Tensor]], Mapping[str, Tensor]]:
    """Return the converter of checkpoints of this model family: timm's, if any, and the family's own.

    It renames the keys of other projects and resamples position embeddings.
    """
    name = body.pretrained_cfg["architecture"]
    modules = (timm.model_entrypoint(name).__module__, type(body).__module__)
    found = (getattr(sys.modules[m], "checkpoint_filter_fn", None) for m in modules)
    rename = next((fn for fn in found if fn is not None), lambda state, model: state)
    resample = family_of(name).resample
    return lambda state: resample(rename(state, body), body)


def freeze(body: nn.Module, is_frozen: Callable[[str], bool]) -> None:
    """Freeze all parameters whose name `is_frozen`, and replace BatchNorms of such weights by frozen ones."""
    for name, parameter in body.named_parameters():
        if is_frozen(name):
            parameter.requires_grad_(False)
    replace_batchnorm(
        body, FrozenBatchNorm2d.from_batchnorm, lambda norm: norm.affine and not norm.weight.requires_grad
    )


def require_multiple(config: BackboneConfig, image_size: tuple[int, int], of: int) -> None:
    """Raise InputError unless both sides of the canvas are multiples of `of` pixels."""
    if image_size[0] % of or image_size[1] % of:
        raise InputError(
            f"backbone '{config.name}' needs a canvas of multiples of {of}, not "
            f"{image_size[0]}x{image_size[1]}: change data.size"
        )


def cast_to_float32(table: Tensor) -> Tensor:
    """Return a detached float32 copy of a constant table, to be registered as a buffer."""
    return table.detach().to(torch.float32).clone()
