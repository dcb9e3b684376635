"""Converted backbones and unusual layouts under ZeRO-3 on two ranks, against plain PyTorch in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import launch_ok

WORKER = Path(__file__).with_name("worker_architectures.py")
BACKBONES: dict[str, dict[str, Any]] = {
    "dilated and deformable": {
        "name": "test_resnet",
        "output_stride": 16,
        "deformable_stages": [4, 5],
        "timm_args": {"zero_init_last": False},
    },
    "hiera": {
        "name": "hiera_tiny_224",
        "timm_args": {"embed_dim": 8, "stages": [1, 1, 1, 1], "num_heads": 1},
    },
    "rotary, with padded windows and tiled positions": {
        "name": "eva02_base_patch14_224",
        "timm_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
        "window": 3,
        "global_blocks": 1,
        "position_grid": [3, 3],
        "position_fit": "tile",
        "attend_padding": True,
    },
    "maxvit": {
        "name": "maxvit_pico_rw_256",
        "timm_args": {"embed_dim": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "stem_width": 8},
    },
}


def test_stage_3_equals_plain_pytorch(tmp_path: Path, demo_data: Path) -> None:
    """Losses agree to 1e-5 and nearly all weights to a thousandth of the LR, as for every architecture."""
    cases: dict[str, Any] = {}
    for number, backbone in enumerate(BACKBONES.values()):
        own = {"kind": "mask_rcnn", "data": str(demo_data), "giantdet__model__backbone": backbone}
        cases[f"{number}_hand"] = {**own, "by_hand": True}
        cases[f"{number}_3"] = {**own, "zero_optimization__stage": 3}
    launch_ok(WORKER, 2, tmp_path, json.dumps(cases))
    found = {name: torch.load(tmp_path / f"{name}.pt") for name in cases}
    for number, name in enumerate(BACKBONES):
        mine, hand = found[f"{number}_3"], found[f"{number}_hand"]
        assert mine["losses"] == pytest.approx(hand["losses"], rel=1e-5), name
        assert mine["weights"].keys() == hand["weights"].keys(), name
        if "deformable" in name:
            assert sum(".offset." in key for key in hand["weights"]) > 4
            trained = [w for key, w in hand["weights"].items() if ".offset." in key]
            assert any(weight.abs().max() > 1e-5 for weight in trained)
        far = [(weight - hand["weights"][key]).abs().flatten() for key, weight in mine["weights"].items()]
        assert torch.cat(far).gt(2e-6).float().mean() < 0.01, name
