"""Write docs/backbones.md, the table of tested backbone families: python scripts/backbones.py

Parameters and FLOPs are counted on the meta device, without weights; it takes minutes. The tests train and
evaluate the small model of each row, and check rows of the page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from giantdet.config.architectures.common import BackboneConfig
from giantdet.errors import InputError
from giantdet.layers.backbone import build_backbone
from giantdet.layers.deferred import deferred_init

PAGE = Path(__file__).resolve().parents[1] / "docs/backbones.md"
CANVAS = (1024, 1024)


class Row(NamedTuple):
    """A family: the models on the page, and a small one, with timm's arguments, that the tests run."""

    family: str
    models: tuple[str, ...]
    small: str
    timm_args: dict[str, Any]
    note: str = ""


_ONE = {"layers": [1, 1, 1, 1]}
_NARROW = {"embed_dim": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "stem_width": 8}
_PLAIN = {"embed_dim": 48, "depth": 4, "num_heads": 3}
ROWS = (
    Row("ResNet", ("resnet50", "resnet101"), "resnet26", _ONE),
    Row("ResNeXt", ("resnext101_64x4d", "resnext101_32x8d"), "resnext50_32x4d", _ONE),
    Row("SENet", ("legacy_senet154",), "legacy_seresnext26_32x4d", _ONE),
    Row("Inception-v4", ("inception_v4",), "inception_v4", {}, "1"),
    Row("Inception-ResNet-v2", ("inception_resnet_v2",), "inception_resnet_v2", {}, "1"),
    Row("Res2Net", ("res2net101_26w_4s",), "res2net50_26w_4s", _ONE),
    Row("RegNet", ("regnety_032", "regnety_320"), "regnety_002", {}),
    Row("EfficientNet", ("efficientnet_b4", "tf_efficientnetv2_l"), "efficientnet_b0", {}),
    Row("ConvNeXt-v2", ("convnextv2_base", "convnextv2_huge"), "convnextv2_atto", {}),
    Row("MaxViT", ("maxvit_base_tf_512", "maxvit_rmlp_small_rw_224"), "maxvit_tiny_tf_224", _NARROW, "2"),
    Row("CoAtNet", ("coatnet_2_rw_224", "coatnet_rmlp_2_rw_224"), "coatnet_pico_rw_224", _NARROW, "3"),
    Row(
        "DaViT",
        ("davit_base", "davit_giant"),
        "davit_tiny",
        {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    ),
    Row(
        "Hiera",
        ("hiera_base_plus_224", "hiera_huge_224"),
        "hiera_tiny_224",
        {"embed_dim": 16, "stages": [1, 1, 1, 1], "num_heads": 1},
        "3",
    ),
    Row("Swin", ("swin_base_patch4_window7_224",), "swin_tiny_patch4_window7_224", {"embed_dim": 24}),
    Row(
        "SigLIP",
        ("vit_base_patch16_siglip_224", "vit_so400m_patch14_siglip_224"),
        "vit_base_patch16_siglip_224",
        _PLAIN,
        "4",
    ),
)

HEAD = """# Backbones

Set `model.backbone.name` to any model of timm. The families below are tested: a small member of each trains a
step and evaluates in Mask R-CNN on a canvas of 96 x 160 pixels, and weights of its native size load on that
canvas (`tests/layers/test_families.py`). Other families of timm work where their maps are at strides 4, 8, 16
and 32; a model that cannot work is refused in one line.

Million parameters and GFLOPs (2 per multiply-add) are those of the backbone alone, forward, for one image of
1024 x 1024. "Dilated" takes `output_stride`, "deformable" takes `deformable_stages` (here stages 4 and 5).

| family | model | M parameters | GFLOPs | maps' strides | dilated | deformable | note |
|---|---|---|---|---|---|---|---|
"""

NOTES = """
1. timm's Inception networks have convolutions without padding, whose maps are one to four cells short and off
   by up to 2.25 cells. They are padded here by half their kernel, with the same weights. The cell i of the
   map of stride s is then centred at pixel s * i, as in a ResNet: at the centre of its anchors (to half a
   pixel), and less than half a cell from where RoIAlign assumes it. Near the border they see zeros where
   ImageNet training saw the image.
2. The windows are 1/32 of the canvas, as in timm for every image size; tables of relative positions are
   resampled when weights are loaded. Attention over larger windows needs more FLOPs per pixel.
3. The attention of the last two stages is global: its cost grows with the square of the canvas. Tables of
   positions are resampled when weights are loaded (Hiera's by giantdet, the others by timm).
4. A plain ViT, run as in ViTDet with windows of 16 patches; a patch of 14 pixels becomes 16. The pooling head
   is left out. NaFlex models take lists of patches and have no map: choose the `vit_*_siglip_*` model.

## Dilated last stages

`"output_stride": 16` runs the last stage at stride 16, with dilated convolutions instead of a stride; `8` the
last two. The weights are the same. P2 to P6 then are at strides 4, 8, 16, 16 and 32: P5 is added to P4 cell
by cell, anchors keep their sizes and follow the strides, and a RoI is still assigned to a level by its size,
because P5 has the larger receptive field. The last stage has four times the cells: resnet50 takes 1.5 times
the FLOPs with 16, and 4.7 times with 8. Cells of ConvNeXt's dilated maps are centred half a cell further
right and down than those of its other maps.

## Deformable convolutions

`"deformable_stages": [3, 4, 5]` makes the 3x3 convolutions of the stages of C3, C4 and C5 deformable (DCNv2),
from outside: timm's names and pretrained weights stay valid, and groups, stride and dilation are kept. Each
gets a layer `offset` (18 offsets and 9 masks), initialised with zeros. The mask is 2 * sigmoid, so that a
converted layer starts out equal to the plain one. The paper, mmcv and detectron2 have sigmoid, which starts
at half of it: their weights fit if the convolution's own weight is halved. The operator is torchvision's, in
float32 because it does not take bf16.

The paper trains offsets with a tenth of the learning rate: make them a module of their own, with
`"agvm": {"modules": {"offsets": ["*.offset.*"], "rest": ["*"]}}` (it need not be enabled) and
`"param_groups": {"lr_multipliers": {"offsets": 0.1}}`.
"""


def main() -> None:
    PAGE.write_text(render())
    print(f"wrote {PAGE}")


def render() -> str:
    """Return the text of docs/backbones.md."""
    return HEAD + "\n".join(line(row, name) for row in ROWS for name in row.models) + "\n" + NOTES


def line(row: Row, name: str) -> str:
    """Return the table's line of one model."""
    with deferred_init():
        backbone = build_backbone(BackboneConfig(name=name), CANVAS)
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    backbone = backbone.to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.empty(1, 3, *CANVAS, device="meta"))
    cells = [
        row.family,
        f"`{name}`",
        f"{millions:.1f}",
        f"{counter.get_total_flops() / 1e9:.0f}",
        ", ".join(map(str, backbone.strides)),
        "yes" if works(name, output_stride=16) else "",
        "yes" if works(name, deformable_stages=[4, 5]) else "",
        f"({row.note})" if row.note else "",
    ]
    return f"| {' | '.join(cells)} |"


def works(name: str, **options: Any) -> bool:
    """Return whether a model of this name can be built with further settings of the backbone."""
    try:
        with deferred_init():
            build_backbone(BackboneConfig(name=name, **options), CANVAS)
    except InputError:
        return False
    return True


if __name__ == "__main__":
    main()
