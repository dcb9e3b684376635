"""End-to-end test of the 7B detector on two CPU ranks at ZeRO-3, with a small width: all 40 blocks, windows
with 4 global blocks, rotary embeddings; from real images to a sharded export, by the script for GPUs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors import safe_open
from tiny import environment, free_port, logs, run_together

REPO = Path(__file__).resolve().parents[2]
RECIPE = REPO / "ds_configs/mask_rcnn_vitdet_dinov3_7b_64_adamw.json"
# As many windows as a 1024-pixel canvas with windows of 16 patches has.
CUT = [
    'model.backbone.timm_args={"embed_dim": 32, "num_heads": 2}',
    "data.size=[256,256]",
    "data.short_side=256",
    "model.backbone.window=4",
    "model.backbone.drop_path_rate=0",
    "model.fpn.channels=32",
    "model.box_head.width=32",
    "model.box_head.batch_per_image=32",
    "model.mask_head.width=16",
    "model.mask_head.slots=8",
    "model.rpn.pre_nms_train=300",
    "model.rpn.post_nms_train=100",
    "data.workers=0",
    "train.export_shard=0.002",
    # DeepSpeed does not release a weight that is used again within this many elements, and looks that far
    # ahead once per module: this covers as many modules as at full width, but not always all of them.
    "zero_optimization.stage3_max_reuse_distance=60000",
    "bf16.enabled=false",
]


def test_giant_detector_trains_resumes_exports_and_predicts(shared: Path, tmp_path: Path) -> None:
    data = shared / "data/fruits_nuts"
    command = [
        *(sys.executable, REPO / "studies/giant.py", RECIPE),
        *("--annotations", data / "annotations/instances_train.json", "--images", data / "images"),
        *(
            "--output",
            tmp_path / "run",
            "--ranks",
            "2",
            "--port",
            free_port(),
            "--lr",
            "5e-3",
            "--steps",
            "12",
            "--micro-batch",
            "2",
        ),
        *CUT,
    ]
    ended = run_together([(list(map(str, command)), environment())], fresh=False)
    assert ended[0].code == 0, logs(ended)
    report = json.loads((tmp_path / "run/report.json").read_text())
    config = json.loads((tmp_path / "run/config.json").read_text())
    backbone = config["giantdet"]["model"]["backbone"]
    assert backbone["checkpoint_blocks"] is True and backbone["global_blocks"] == 4
    assert (report["zero_stage"], report["ranks"], len(report["losses"])) == (3, 2, 16)
    assert report["loss_last_5"] < 0.95 * report["loss_first_5"]
    assert report["predicted_images"] == 2
    index = json.loads((tmp_path / "run/export/model.safetensors.index.json").read_text())
    assert len(report["shards"]) > 1 and set(index["weight_map"].values()) == set(report["shards"])
    names = set()
    for shard in report["shards"]:
        with safe_open(tmp_path / "run/export" / shard, "pt") as file:
            names |= set(file.keys())
    assert names == index["weight_map"].keys()
    assert sum(name.endswith("attn.qkv.weight") for name in names) == 40
    assert 0 < report["share_of_matrix_rate"] < 1
