"""The `model` section of a model whose tensors are known, by names and shapes."""

from __future__ import annotations

import math
from typing import Any, Literal

from giantdet.architectures.foreign.backbones import backbone_of
from giantdet.architectures.foreign.project import State, numbers
from giantdet.errors import InputError

_LVIS = 1203  # classes of LVIS v1; with a softmax there is a logit more


def section_of(state: State, affine_norm: Literal["group", "layer"]) -> dict[str, Any]:
    """Return the section for tensors under giantdet's names, those of any supported project.

    What shapes do not tell has its default: the caller adds it (`Settings.section`). `affine_norm` is the
    name of norms without running statistics. Raises InputError for a model that giantdet does not have.
    """
    found = _Shapes(state, affine_norm)
    if "decode_head.classes.weight" in state:
        return found.upernet()
    if "head.classes.weight" in state:
        return found.retinanet()
    if "box_head.classes.weight" in state or "box_head.0.classes.weight" in state:
        return found.two_stages()
    if "semantic_head.classes.weight" in state:
        return found.semantic()
    raise InputError("it is a model that giantdet does not support")


class _Shapes:
    def __init__(self, state: State, affine_norm: str) -> None:
        self.state, self.affine_norm = state, affine_norm

    def count(self, pattern: str) -> int:
        return len(numbers(self.state, pattern))

    def norm(self, block: str) -> str:
        """Return the name of the norm after the convolution of a block."""
        if f"{block}.1.running_var" in self.state:
            return "batch"
        return self.affine_norm if f"{block}.1.weight" in self.state else "none"

    def shape(self, name: str) -> list[int]:
        return [*self.state[f"{name}.weight"].shape]

    def pyramid(self) -> dict[str, Any]:
        block = "fpn.outputs.0"
        if "fpn.stages.0.0.weight" in self.state:  # ViTDet's: P4 is the one that begins with a convolution
            block = "fpn.stages.2.0"
        return {"channels": self.shape(f"{block}.0")[0], "norm": self.norm(block)}

    def common(self, kind: str) -> dict[str, Any]:
        return {"type": kind, "backbone": backbone_of(self.state)}

    def retinanet(self) -> dict[str, Any]:
        anchors = self.shape("head.deltas")[0] // 4
        if anchors != 9:
            raise InputError(f"its RetinaNet has {anchors} anchors per cell; only 9 are read")
        section = self.common("retinanet") | {"fpn": self.pyramid()}
        section["num_classes"] = self.shape("head.classes")[0] // anchors
        convs = self.count(r"head\.class_convs\.(\d+)\.")
        section["head"] = {"convs": convs, "norm": self.norm("head.class_convs.0")}
        from_p5 = self.shape("fpn.top.p6")[1] == section["fpn"]["channels"]
        section["extra_levels_from"] = "p5" if from_p5 else "c5"
        return section

    def two_stages(self) -> dict[str, Any]:
        stages = self.count(r"box_head\.(\d+)\.classes\.")
        box_head = "box_head.0" if stages else "box_head"
        if stages not in (0, 3):
            raise InputError(f"its cascade has {stages} stages; only 3 are supported")
        classes = self.shape(f"{box_head}.classes")[0] - 1
        if classes + 1 == _LVIS:
            raise InputError(
                f"its boxes have {_LVIS} logits, those of LVIS without a background: sigmoid losses "
                "(use_sigmoid_ce), which giantdet does not support"
            )
        agnostic = self.shape(f"{box_head}.deltas")[0] == 4
        if agnostic != bool(stages) and classes > 1:
            kind = "class-agnostic boxes" if agnostic else "a cascade with boxes for each class"
            raise InputError(f"it has {kind}, which giantdet does not support")
        is_panoptic = "semantic_head.classes.weight" in self.state
        kind = "cascade_mask_rcnn" if stages else "panoptic_fpn" if is_panoptic else "mask_rcnn"
        section = self.common(kind) | {"num_classes": classes, "fpn": self.pyramid()}
        section["rpn"] = self.rpn()
        width, inputs = self.shape(f"{box_head}.fcs.0")
        section["box_head"] = {
            "convs": self.count(rf"{box_head}\.convs\.(\d+)\."),
            "fcs": self.count(rf"{box_head}\.fcs\.(\d+)\."),
            "width": width,
            "resolution": math.isqrt(inputs // section["fpn"]["channels"]),
            "norm": self.norm(f"{box_head}.convs.0"),
        }
        section["mask_head"] = self.mask_head()
        if is_panoptic:
            section["semantic_head"] = self.semantic_head()
            section["num_stuff_classes"] = self.shape("semantic_head.classes")[0] - 1
        return section

    def rpn(self) -> dict[str, Any]:
        anchors, logits = self.shape("rpn.head.deltas")[0] // 4, self.shape("rpn.head.objectness")[0]
        if anchors != 3:
            raise InputError(f"its RPN has {anchors} anchors per cell; only 3 are read")
        section: dict[str, Any] = {"convs": 1 + self.count(r"rpn\.head\.further_convs\.(\d+)\.")}
        return section if logits == anchors else section | {"objectness": "softmax"}

    def mask_head(self) -> dict[str, Any]:
        head = "mask_head.0" if "mask_head.0.masks.weight" in self.state else "mask_head"
        if f"{head}.masks.weight" not in self.state:
            return {"enabled": False}
        convs = self.count(rf"{head}\.convs\.(\d+)\.")
        return {"convs": convs, "width": self.shape(f"{head}.masks")[1], "norm": self.norm(f"{head}.convs.0")}

    def semantic_head(self) -> dict[str, Any]:
        block = "semantic_head.levels.0.0"
        return {"width": self.shape("semantic_head.classes")[1], "norm": self.norm(block)}

    def semantic(self) -> dict[str, Any]:
        section = self.common("semantic_fpn") | {"fpn": self.pyramid(), "semantic_head": self.semantic_head()}
        return section | {"num_classes": self.shape("semantic_head.classes")[0]}

    def upernet(self) -> dict[str, Any]:
        classes, width, *_ = self.shape("decode_head.classes")
        scales = self.count(r"decode_head\.pooling\.scales\.(\d+)\.")
        if scales != 4:
            raise InputError(f"its pooling pyramid has {scales} scales; only 4 (1, 2, 3, 6) are read")
        auxiliary: dict[str, Any] = {"enabled": False}
        if "auxiliary_head.classes.weight" in self.state:
            auxiliary = {
                "width": self.shape("auxiliary_head.classes")[1],
                "convs": self.count(r"auxiliary_head\.convs\.(\d+)\."),
                "norm": self.norm("auxiliary_head.convs.0"),
            }
        section = self.common("upernet") | {"num_classes": classes, "auxiliary_head": auxiliary}
        return section | {"decode_head": {"width": width, "norm": self.norm("decode_head.outputs.0")}}
