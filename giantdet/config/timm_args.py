"""Arguments of timm's models that are not the user's to give, because other keys set them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_PYRAMID = "giantdet takes the maps of strides 4 to 32 itself; leave it out"
OWNED: dict[str, str] = {
    "img_size": "the model is built for giantdet.data.size; leave it out, and change that",
    "dynamic_img_size": "the model is built for giantdet.data.size; leave it out",
    "strict_img_size": "the model is built for giantdet.data.size; leave it out",
    "always_partition": "giantdet sets it; leave it out",
    "in_chans": "images have 3 channels; leave it out",
    "num_classes": "a backbone has no classifier; leave it out, and set giantdet.model.num_classes",
    "features_only": _PYRAMID,
    "out_indices": _PYRAMID,
    "output_stride": "leave it out, and set backbone.output_stride",
    "patch_size": "leave it out, and set backbone.patch_size (for plain ViTs)",
    "drop_path_rate": "leave it out, and set backbone.drop_path_rate",
    "pretrained": "leave it out, and set backbone.pretrained",
    "checkpoint_path": "leave it out, and set backbone.init_weights",
    "model_name": "leave it out, and set backbone.name",
}
"""What to do instead, by the argument's name."""


def problems(timm_args: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each argument that contradicts other keys, or could."""
    for key in timm_args:
        if key in OWNED:
            yield f"backbone.timm_args.{key}: {OWNED[key]}"
