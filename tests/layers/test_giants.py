"""Giant backbones, built without allocating their large weights: parameters, FLOPs, strides and channels.

FLOPs come from PyTorch's counter on the meta device: 2 per multiply-add, forward, one 1024 x 1024 image. The
expected numbers were counted with timm's own models; plain ViTs with patch 16, window 16 and 4 global blocks.
"""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from giantdet.architectures import build_model
from giantdet.config.architectures.common import BackboneConfig
from giantdet.config.classes import Classes
from giantdet.config.load import load_run
from giantdet.config.resolve import resolve
from giantdet.layers.backbone import build_backbone
from giantdet.layers.deferred import deferred_init, is_deferred

# timm name: million parameters of the backbone, TFLOPs, channels
GIANTS: dict[str, tuple[float, float, tuple[int, ...]]] = {
    "vit_huge_patch14_224": (635.9, 5.66, (1280,)),
    "eva_giant_patch14_560": (1016.8, 8.87, (1408,)),
    "vit_giant_patch14_reg4_dinov2": (1140.9, 9.93, (1536,)),
    "vit_gigantic_patch14_clip_224": (1849.5, 15.84, (1664,)),
    "vit_huge_plus_patch16_dinov3": (840.5, 7.37, (1280,)),
    "vit_7b_patch16_dinov3": (6716.0, 56.7, (4096,)),
    "eva02_enormous_patch14_clip_224": (4355.9, 36.5, (1792,)),
    "convnext_xxlarge": (843.4, 6.33, (384, 768, 1536, 3072)),
    "convnextv2_huge": (657.5, 4.80, (352, 704, 1408, 2816)),
    "davit_giant": (1403.4, 8.30, (384, 768, 1536, 3072)),
    "swin_large_patch4_window7_224": (195.0, 1.52, (192, 384, 768, 1536)),
    "swinv2_cr_giant_224": (2594.7, 21.3, (512, 1024, 2048, 4096)),
}


@pytest.mark.parametrize("name", GIANTS)
def test_backbone(name: str) -> None:
    millions, tflops, channels = GIANTS[name]
    with deferred_init():
        backbone = build_backbone(BackboneConfig(name=name), (1024, 1024))
    sizes = {key: p.numel() for key, p in backbone.named_parameters()}
    assert sum(sizes.values()) / 1e6 == pytest.approx(millions, abs=0.1)
    real = sum(p.numel() for p in backbone.parameters() if not is_deferred(p))
    assert real < 3e6, "parameters in memory"
    backbone = backbone.to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        maps = backbone(torch.empty(1, 3, 1024, 1024, device="meta"))
    assert counter.get_total_flops() / 1e12 == pytest.approx(tflops, rel=0.005)
    assert backbone.channels == channels
    assert backbone.strides == ((16,) if len(channels) == 1 else (4, 8, 16, 32))
    wanted = [(1, c, 1024 // s, 1024 // s) for c, s in zip(channels, backbone.strides, strict=True)]
    assert [tuple(level.shape) for level in maps] == wanted


def test_a_detector_of_a_billion_parameters_is_built_in_megabytes() -> None:
    path = Path(__file__).parents[2] / "ds_configs/mask_rcnn_vitdet_giant_960_agvm_adamw.json"
    run = resolve(load_run(path, ["model.backbone.pretrained=false"]), 480, 117_266, Classes.numbered(80))
    config = run.giantdet
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with deferred_init():
        model = build_model(config.model, config.data.size, config.norm, 1)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(1047.9, abs=0.1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
