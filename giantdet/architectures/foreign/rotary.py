"""Rotary tables in the files of EVA-02's and PE's detectors: windows, global blocks, heads, reference grid.

Both are ViTDet's plain ViT with two tables `[side * side, head dimension]` of cosines and sines, `rope_win`
for windows and `rope_glb` for the whole canvas. The file has a copy of its table for each block, which alone
tells whether the block is global. giantdet computes the tables, so those of the file are compared with the
formula. Sources: EVA-02/det's `modeling/backbone/utils.py`, and `pev1_det.py` of PE's detectron2 project.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from giantdet.architectures.foreign.backbones import chosen_blocks
from giantdet.architectures.foreign.detectron2 import DETECTRON2
from giantdet.architectures.foreign.project import Replacement, Settings, State, numbers, renamed

NET = "backbone.net."
UNUSED = (
    *DETECTRON2.unused,
    (r"^backbone\.net\..*rope(_win|_glb)?\.freqs_(cos|sin)$", "rotary tables, which giantdet computes"),
)
_UNCHECKED = "trained numbers were not (no published file was at hand): look at a few predictions first"
_BASE = 10000.0  # of the frequencies
_TOLERANCE = 0.02  # of sines and cosines: files may be in half precision
_KEY = "model.backbone."
_TABLES = ("rope_win", "rope_glb")


class Rotary(NamedTuple):
    """What the tables of a file tell."""

    section: dict[str, Any]
    """Keys of the `backbone` section."""
    canvas: int | None
    """Side of the canvas in pixels."""
    untold: tuple[str, ...]
    """Keys of config.json that only missing tables would tell."""
    problem: str
    """Why the tables are not those that giantdet computes; empty if they are."""

    def settings(self, state: State, title: str, assumed: str, backbone: Mapping[str, Any]) -> Settings:
        """Return detectron2's settings with what the tables tell.

        `title` is the project's, `backbone` has further keys of its section.
        """
        return DETECTRON2.settings(state).of_backbone(
            {**backbone, **self.section},
            canvas=self.canvas,
            untold=self.untold,
            problem=self.problem,
            assumed=f"{assumed}, as in {title}'s configurations",
            note=f"names and formulas were checked against {title}'s code, {_UNCHECKED}",
        )


def further_names(keys: Collection[str], rules: tuple[tuple[str, Replacement], ...]) -> dict[str, str]:
    """Return detectron2's names of the parameters, renamed further by a project's own rules."""
    return {key: renamed(name, rules) for key, name in DETECTRON2.names(keys).items()}


def rotary_of(
    state: State, blocks: str, rows_first: bool, head_width: int, reference: int, patch: int, width: int
) -> Rotary:
    """Return what the tables tell of a model of `width` channels with patches of `patch` pixels.

    `blocks` is the name of the list of blocks; `rows_first`: the first half of a head turns with the row.
    `head_width` and `reference`, the side of the grid that positions are scaled to, are those that the
    `backbone` section has without further arguments.
    """
    pairs = [(state.get(f"{NET}{name}.freqs_cos"), state.get(f"{NET}{name}.freqs_sin")) for name in _TABLES]
    (window, window_sines), (whole, whole_sines) = pairs
    if window is None or whole is None or window_sines is None or whole_sines is None:
        return Rotary({}, None, (f"{_KEY}window", f"{_KEY}global_blocks", "size"), "")
    depth = len(numbers(state, re.escape(f"{NET}{blocks}.") + r"(\d+)\."))
    found = _reference(whole, whole_sines)
    args: dict[str, Any] = {}
    if window.shape[1] != head_width:
        args["num_heads"] = width // window.shape[1]
    if found != reference:
        args["ref_feat_shape"] = [found, found]
    section: dict[str, Any] = {"window": _side(window), "timm_args": args}
    names = [f"{NET}{blocks}.{index}.attn.rope.freqs_cos" for index in range(depth)]
    untold: tuple[str, ...] = ()
    if all(name in state for name in names):
        section["global_blocks"] = chosen_blocks([len(state[name]) != len(window) for name in names])
    else:  # in an average of weights, whose buffers are there once
        untold = (f"{_KEY}global_blocks",)
    is_ours = _is_axial(window, window_sines, found, rows_first) and _is_axial(
        whole, whole_sines, found, rows_first
    )
    problem = "" if is_ours else "its rotary tables are not those that giantdet computes"
    return Rotary(section, _side(whole) * patch, untold, problem)


def _side(table: Tensor) -> int:
    return math.isqrt(len(table))


def _turned(cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the angles from the first token, in float32.

    A constant offset of all positions, as PE has it, turns queries and keys alike and changes no product.
    """
    cos, sin = cosines.float(), sines.float()
    return cos * cos[0] + sin * sin[0], sin * cos[0] - cos * sin[0]


def _reference(cosines: Tensor, sines: Tensor) -> int:
    """Return the side of the grid that positions are scaled to: the first frequency is 1."""
    side = _side(cosines)
    cos, sin = _turned(cosines, sines)
    next_diagonal = side + 1 if side > 1 else 0
    return round(side * math.atan2(float(sin[next_diagonal, 0]), float(cos[next_diagonal, 0])))


def _is_axial(cosines: Tensor, sines: Tensor, reference: int, rows_first: bool) -> bool:
    """Return whether the tables are those of `RotaryEmbeddingCat`, up to an offset of all positions."""
    side, half = _side(cosines), cosines.shape[1] // 2
    frequencies = _BASE ** -(torch.arange(0, half, 2) / half)
    angles = torch.arange(side)[:, None] / side * reference * frequencies
    rows, columns = angles.repeat_interleave(side, 0), angles.repeat(side, 1)
    halves = (rows, columns) if rows_first else (columns, rows)
    expected = torch.cat(halves, 1).repeat_interleave(2, 1)
    cos, sin = _turned(cosines, sines)
    if cos.shape != expected.shape:
        return False
    return max(_largest(cos - expected.cos()), _largest(sin - expected.sin())) < _TOLERANCE


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
