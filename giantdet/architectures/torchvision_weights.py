"""Convert torchvision's detector weights to giantdet's names and order of classes.

In torchvision the background is class 0, in detectron2 and giantdet the last class. The fully connected
layers read RoI features in the order (channel, y, x) in both projects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from giantdet.errors import InputError

_EPS = 1e-5  # of the batch norms in timm's ResNets

_RENAMES: tuple[tuple[str, str], ...] = (
    (r"backbone\.body\.", "backbone.body."),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"fpn.laterals.\1.0."),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"fpn.outputs.\1.0."),
    (r"rpn\.head\.conv\.0\.0\.", "rpn.head.conv."),
    (r"rpn\.head\.cls_logits\.", "rpn.head.objectness."),
    (r"rpn\.head\.bbox_pred\.", "rpn.head.deltas."),
    (r"roi_heads\.box_head\.fc6\.", "box_head.fcs.0."),
    (r"roi_heads\.box_head\.fc7\.", "box_head.fcs.1."),
    (r"roi_heads\.box_predictor\.cls_score\.", "box_head.classes."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "box_head.deltas."),
    (r"roi_heads\.mask_head\.(\d)\.0\.", r"mask_head.convs.\1.0."),
    (r"roi_heads\.mask_predictor\.conv5_mask\.", "mask_head.upsample."),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "mask_head.masks."),
)

_CLASS_ORDER: dict[str, Callable[[Tensor], Tensor]] = {
    "box_head.classes.": lambda t: torch.cat([t[1:], t[:1]]),
    "box_head.deltas.": lambda t: t[4:],
    "mask_head.masks.": lambda t: t[1:],
}


def is_torchvision(state: Mapping[str, Tensor]) -> bool:
    """Return whether this is a state dict of torchvision's `FasterRCNN` or `MaskRCNN` with a ResNet-FPN."""
    return any(key.startswith("backbone.fpn.inner_blocks.") for key in state)


def from_torchvision(state: Mapping[str, Tensor], norm_eps: float | None = None) -> dict[str, Tensor]:
    """Return weights of torchvision's `maskrcnn_resnet50_fpn` or `fasterrcnn_resnet50_fpn` by giantdet's
    names.

    Use them with `model.conventions: "torchvision"`, with which they were trained. Files from before
    torchvision 0.12, in which the layers of RPN and mask head have other names, are supported too.

    `norm_eps` is the epsilon of the batch norms that the weights were trained with. torchvision sets it to
    0 for its COCO weights (`overwrite_eps` in `mask_rcnn.py`), but the files do not contain it. None means 0
    for frozen norms (their files have no `num_batches_tracked`), and 1e-5 otherwise. Where the epsilon is not
    1e-5, the weights of the norms are scaled so that their outputs are the same with 1e-5.

    Raises InputError, a ValueError, that lists the keys without a counterpart (those of the v2 models, for
    example).
    """
    converted: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        name = _rename(_modern(key))
        if name is None:
            unknown.append(key)
            continue
        for prefix, reorder in _CLASS_ORDER.items():
            if name.startswith(prefix):
                tensor = reorder(tensor).contiguous()
        converted[name] = tensor
    if unknown:
        raise InputError(
            f"torchvision weights with keys that have no counterpart in giantdet: {', '.join(unknown)}"
        )
    if norm_eps is None:
        norm_eps = _EPS if any(key.endswith("num_batches_tracked") for key in converted) else 0.0
    _fold_eps(converted, norm_eps)
    return converted


def _fold_eps(state: dict[str, Tensor], eps: float) -> None:
    """Replace the weights so that weight / sqrt(var + eps) = weight' / sqrt(var + 1e-5), in place."""
    if eps == _EPS:
        return
    for key in [key for key in state if key.endswith(".running_var")]:
        variance, name = state[key].double(), key.removesuffix("running_var") + "weight"
        factor = ((variance + _EPS) / (variance + eps).clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
        state[name] = (state[name].double() * factor).to(state[name].dtype)


def _modern(key: str) -> str:
    key = re.sub(r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1", key)
    key = re.sub(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2", key)
    return re.sub(
        r"^roi_heads\.mask_head\.mask_fcn(\d)\.", lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.0.", key
    )


def _rename(key: str) -> str | None:
    for pattern, replacement in _RENAMES:
        renamed, count = re.subn(f"^{pattern}", replacement, key)
        if count:
            return renamed
    return None
