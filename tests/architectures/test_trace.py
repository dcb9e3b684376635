"""The operators that a training step really runs: no data-dependent shape, no read-back from the device.

One exception: inside the operator `giantdet::nms_mask`, the CPU's kernel calls torchvision's NMS, whose
result has an unknown length, and scatters it into a mask. On the CPU there is no device to wait for, and the
operator's own output has a fixed shape; the GPU's kernel (`nms_mask_fixed_point`) is checked here too.
The CPU's other shortcuts (`ops/shapes.py`) are switched off, so that the GPU's operators are recorded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_detector import build, load, scenes, step  # noqa: F401
from tiny import MODELS
from torch.utils._python_dispatch import TorchDispatchMode

from giantdet.architectures import MODELS as ARCHITECTURES
from giantdet.data.coco_panoptic import CocoPanopticDataset
from giantdet.ops import shapes
from giantdet.ops.nms import nms_mask_fixed_point

BANNED = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "is_nonzero",
}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


@pytest.fixture(autouse=True)
def fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "ENABLED", False)


class Recorder(TorchDispatchMode):
    """Records the names of all operators, and those that break the rule."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.broken: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.names.add(func._schema.name)
        if name in BANNED:
            self.broken.add(name)
        if name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.broken.add(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


TRAINED: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in MODELS},
    "torchvision": {"conventions": "torchvision"},
    "giou": {"box_head": {"loss": "giou"}},
    "ciou": {"kind": "cascade_mask_rcnn", "box_head": {"loss": "ciou"}},
    "mmdetection": {
        "kind": "mask_rcnn",
        "conventions": "mmdetection",
        "rpn": {"allowed_border": 0},
        "box_head": {"best_takes_object": True},
    },
    "mmdetection's retinanet": {"kind": "retinanet", "conventions": "mmdetection"},
    "mmdetection's cascade": {"kind": "cascade_mask_rcnn", "conventions": "mmdetection"},
    "sampled": {"rpn": {"loss_pass": "sampled"}},
    "challenge": {
        "box_head": {"sampling": {"type": "ohem"}},
        "fpn": {"large_kernel": {"width": 8}, "context": {}},
        "semantic_branch": {"enabled": True, "embed": True},
    },
    "challenge's cascade": {
        "kind": "cascade_mask_rcnn",
        "conventions": "mmdetection",
        "box_head": {"sampling": {"type": "ohem", "over": "image"}},
        "semantic_branch": {"enabled": True, "source": "boxes", "embed": True},
    },
    "dilated and deformable": {
        "backbone": {"name": "test_resnet", "output_stride": 16, "deformable_stages": [4, 5]}
    },
    "vitdet": {
        "backbone": {
            "name": "vit_tiny_patch16_224",
            "timm_args": {"embed_dim": 24, "depth": 2, "num_heads": 3},
            "window": 3,
            "global_blocks": 1,
            "position_grid": [3, 3],
            "relative_positions": True,
            "attend_padding": True,
        },
        "rpn": {"convs": 2},
    },
    "rotary and tiled": {
        "backbone": {
            "name": "eva02_base_patch14_224",
            "timm_args": {"embed_dim": 24, "depth": 2, "num_heads": 3},
            "window": 3,
            "global_blocks": 1,
            "position_grid": [3, 3],
            "position_fit": "tile",
            "attend_padding": True,
        }
    },
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_step(scenes: CocoPanopticDataset, name: str) -> None:  # noqa: F811
    detector, batch = build(**TRAINED[name]), load(scenes)
    with Recorder() as recorder:
        step(detector, batch)
    assert not recorder.broken
    assert {"aten::convolution", "aten::convolution_backward"} <= recorder.names
    assert ("giantdet::nms_mask" in recorder.names) == hasattr(detector, "rpn")


@pytest.mark.parametrize("name", TRAINED)
def test_evaluation(scenes: CocoPanopticDataset, name: str) -> None:  # noqa: F811
    detector, batch = build(**TRAINED[name]).eval(), load(scenes)
    with torch.no_grad(), Recorder() as recorder:
        detector(batch)
    assert not recorder.broken and "aten::convolution" in recorder.names
    assert ("giantdet::nms_mask" in recorder.names) == ("box" in detector.tasks)


def test_every_architecture_is_traced() -> None:
    assert MODELS.keys() == ARCHITECTURES.keys()


def test_nms_of_the_gpu() -> None:
    boxes = torch.rand(2, 20, 4).cumsum(-1)
    with Recorder() as recorder:
        nms_mask_fixed_point(boxes, torch.rand(2, 20), torch.rand(2, 20) > 0.2, 0.5)
    assert not recorder.broken and len(recorder.names) > 5


@pytest.mark.parametrize(
    "code", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any())]
)
def test_the_recorder_detects(code: Any) -> None:
    with Recorder() as recorder:
        code(torch.ones(3))
    assert recorder.broken
