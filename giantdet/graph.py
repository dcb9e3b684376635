"""Models as graphs that run without giantdet: programs of `torch.export` (.pt2) and ONNX (.onnx).

A graph has the canvas and the number of images that it was made for. Its inputs are

    images  uint8 [B, 3, H, W]  RGB, scaled, in the upper left corner of the canvas, zero elsewhere
    sizes   float32 [B, 2]      (height, width) of each scaled image

and its outputs, of which a model has those of its tasks,

    boxes     float32 [B, D, 4]        xyxy, pixels of the canvas, best first
    scores    float32 [B, D]           0 where there is no object
    labels    int64 [B, D]             class index
    masks     float32 [B, D, S, S]     probabilities in the frame of the box
    semantic  float32 [B, C, h, w]     logits at stride 4 of the canvas

A .onnx file has the export's config.json, with the names of classes, in its metadata as "giantdet".
"""

from __future__ import annotations

import logging
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from giantdet.architectures import Architecture
from giantdet.data.views import no_targets
from giantdet.errors import InputError
from giantdet.export import load_detector
from giantdet.ops.roi_align import pooling_by_level
from giantdet.structures import Batch, Outputs

ENDINGS = (".onnx", ".pt2")


class Graph(nn.Module):
    """A detector with plain tensors as inputs and outputs."""

    def __init__(self, detector: Architecture) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name."""
        numbers_B = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        targets = no_targets(len(images))
        batch = Batch(images, sizes, targets, numbers_B, numbers_B, sizes.long())
        outputs: Outputs = self.detector(batch)
        named: dict[str, Tensor] = {}
        if (found := outputs.detections) is not None:
            named["boxes"] = found.boxes_BD4
            named["scores"] = torch.where(found.valid_BD, found.scores_BD, 0.0)
            named["labels"] = found.labels_BD
            if found.masks_BDSS is not None:
                named["masks"] = found.masks_BDSS
        if outputs.semantic_BCHW is not None:
            named["semantic"] = outputs.semantic_BCHW
        return named


def export_graph(source: str | Path, file: str | Path, batch_size: int = 1) -> Path:
    """Write an export as a graph, and return the path of its file.

    Args:
        source: what `export_folder` takes: an export, a run, or `hf_hub:OWNER/NAME`.
        file: .pt2 for a program of `torch.export`, .onnx for ONNX, which needs `giantdet[onnx]`.
        batch_size: images that the graph takes.

    Raises InputError, a ValueError, for another ending and without the packages.
    """
    file = Path(file).expanduser()
    if file.suffix not in ENDINGS:
        raise InputError(f"{file}: a graph's file ends with {' or '.join(ENDINGS)}")
    if file.suffix == ".onnx":
        check_onnx()
    detector, config = load_detector(source)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".onnx":
        _unfuse_attention(detector)
    # ONNX has RoIAlign as an operator; the faster path on CPUs would be a loop over all bins.
    with pooling_by_level() if file.suffix == ".onnx" else nullcontext():
        program = exported(detector, config.size, batch_size)
    if file.suffix == ".pt2":
        torch.export.save(program, file)
    else:
        save_onnx(program, file, {"giantdet": config.model_dump_json()})
    return file


def _unfuse_attention(detector: Architecture) -> None:
    """Let timm's modules compute attention step by step.

    PyTorch's fused attention returns a transposed layout on CPUs. timm's reshaping of it is traced as a view,
    which is impossible for the steps that ONNX has instead.
    """
    for module in detector.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]


def exported(
    detector: Architecture, size_hw: tuple[int, int], batch_size: int = 1
) -> torch.export.ExportedProgram:
    """Return the program of a detector in evaluation mode on the CPU, for a canvas of `size_hw`."""
    images = torch.zeros(batch_size, 3, *size_hw, dtype=torch.uint8)
    sizes = torch.tensor([size_hw] * batch_size, dtype=torch.float32)
    return torch.export.export(Graph(detector.eval()), (images, sizes), strict=False)


def check_onnx() -> None:
    """Raise InputError where the packages for ONNX are missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f'{error.name} is missing: pip install "giantdet[onnx]"') from error


def save_onnx(program: torch.export.ExportedProgram, file: Path, metadata: dict[str, str]) -> None:
    """Write a program of a `Graph` as ONNX."""
    names = list(program.module()(*program.example_inputs[0]))
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)  # notes on constants that are not folded
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                output_names=names,
                custom_translation_table={torch.ops.giantdet.nms_mask.default: _nms_mask},
            )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    converted.model.metadata_props.update(metadata)
    converted.save(str(file))


def _nms_mask(boxes_GK4: Any, scores_GK: Any, valid_GK: Any, iou_threshold: float) -> Any:
    """`giantdet::nms_mask` in ONNX, whose operator returns the numbers of the boxes that stay."""
    from onnxscript import opset18

    op: Any = opset18  # its types know ONNX's tensors only
    scores_GK = op.Where(valid_GK, scores_GK, op.Constant(value_float=-1e30))
    kept_N3 = op.NonMaxSuppression(
        boxes_GK4,
        op.Unsqueeze(scores_GK, op.Constant(value_ints=[1])),  # of one class
        op.Constant(value_ints=[2**31 - 1]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[-1e29]),
    )
    places_N2 = op.Gather(kept_N3, op.Constant(value_ints=[0, 2]), axis=1)  # group and box, without the class
    count = op.Slice(op.Shape(places_N2), op.Constant(value_ints=[0]), op.Constant(value_ints=[1]))
    true_N = op.Expand(op.Cast(op.Constant(value_ints=[1]), to=9), count)  # 9: bool
    return op.ScatterND(op.And(valid_GK, op.Not(valid_GK)), places_N2, true_N)
