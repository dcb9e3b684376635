"""The models by the name in `model.type`.

A new architecture is one line here, and one in `config/architectures/__init__.py` for its section.
"""

from __future__ import annotations

from typing import Any

from giantdet.architectures.base import Architecture, total_loss
from giantdet.architectures.cascade_mask_rcnn import CascadeMaskRcnn
from giantdet.architectures.mask_rcnn import MaskRcnn
from giantdet.architectures.panoptic_fpn import PanopticFpn
from giantdet.architectures.retinanet import RetinaNet
from giantdet.architectures.semantic_fpn import SemanticFpn
from giantdet.architectures.upernet import UperNet
from giantdet.config.architectures import ArchitectureConfig
from giantdet.config.architectures.common import NormConfig
from giantdet.layers.norm import apply_norm

__all__ = ["MODELS", "Architecture", "build_model", "total_loss"]

MODELS: dict[str, Any] = {
    "mask_rcnn": MaskRcnn,
    "cascade_mask_rcnn": CascadeMaskRcnn,
    "panoptic_fpn": PanopticFpn,
    "retinanet": RetinaNet,
    "semantic_fpn": SemanticFpn,
    "upernet": UperNet,
}


def build_model(
    config: ArchitectureConfig,
    image_size: tuple[int, int],
    norm: NormConfig | None = None,
    images_per_rank: int | None = None,
) -> Architecture:
    """Return the model of a run, with its batch norms converted as the `norm` block says.

    `image_size` is (height, width) of the canvas in pixels. `images_per_rank` is the micro-batch, which
    determines the groups of CGBN; None: CGBN is local, as in evaluation.
    """
    model: Architecture = MODELS[config.type](config, image_size)
    norm = norm or NormConfig()
    apply_norm(model.backbone, norm.of("backbone"), images_per_rank)
    for part, modules in model.norm_parts().items():
        for module in modules:
            apply_norm(module, norm.of(part), images_per_rank)
    # Weights are not made channels-last: DeepSpeed 0.19 broadcasts them as bytes, and raises for that layout.
    return model
