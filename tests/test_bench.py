"""The step benchmark runs, compares equal work, and reports what it compared. No time is asserted."""

from __future__ import annotations

import re
import sys

import pytest
from tiny import REPO, environment, logs, run_together


def bench(*arguments: str) -> str:
    command = [
        sys.executable,
        str(REPO / "benchmarks" / "bench.py"),
        "--device",
        "cpu",
        "--threads",
        "1",
        *arguments,
    ]
    ended = run_together([(command, environment())], fresh=False)
    assert ended[0].code == 0, logs(ended)
    return ended[0].out


def counts(output: str, side: str) -> dict[str, float]:
    line = next(line for line in output.splitlines() if re.match(rf"  {side} +loss ", line))
    return {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)", line)}


def test_both_sides_do_the_same_work() -> None:
    small = ("--size", "64", "--batch", "1", "--objects", "2", "--max-objects", "4", "--rois", "16")
    output = bench(*small, "--mask-slots", "4", "--pairs", "1")
    ours, theirs = counts(output, "giantdet"), counts(output, "torchvision")
    assert ours["rois"] == theirs["rois"] == 16
    assert ours["masks_computed"] >= ours["masks_trained"] >= 1  # the CPU skips unused slots
    assert theirs["masks_computed"] >= 1
    # The weights and pixels are the same; the two draw different RoIs.
    assert abs(ours["loss"] - theirs["loss"]) < 0.2 * theirs["loss"]
    assert len(re.findall(r"data [\d.]+  forward [\d.]+  backward [\d.]+  optimizer [\d.]+", output)) == 4
    assert re.search(r"^machine: .+ cores, 1 threads", output, re.MULTILINE)
    ratio = re.search(r"^median ratio: ([\d.]+)$", output, re.MULTILINE)
    assert ratio and float(ratio[1]) > 0


def test_refuses_settings_that_torchvision_does_not_have() -> None:
    command = [sys.executable, str(REPO / "benchmarks" / "bench.py"), "--backbone", "convnext_atto"]
    (ended,) = run_together([(command, environment())], fresh=False)
    assert ended.code == 2
    assert "--only giantdet" in ended.err


def test_bench_of_masks_gives_the_same_masks() -> None:
    script = REPO / "benchmarks" / "bench_masks.py"
    command = [sys.executable, str(script), "--images", "1", "--detections", "3", "--height", "60"]
    (ended,) = run_together([(command, environment())], fresh=False)
    assert ended.code == 0, ended.err
    differing = re.search(r"pixels that differ from detectron2's: (\d+)", ended.out)
    assert differing and int(differing[1]) <= 2, ended.out


def test_bench_of_evaluations_agrees_for_all_backends() -> None:
    pytest.importorskip("hotcoco")
    script = REPO / "benchmarks" / "bench_eval.py"
    command = [sys.executable, str(script), "--images", "3", "--detections", "9"]
    (ended,) = run_together([(command, environment())], fresh=False)
    assert ended.code == 0, ended.err
    assert ended.out.count("same numbers: True") == 4 and "False" not in ended.out
    assert len(set(re.findall(r"AP (0\.\d+)", ended.out))) == 2, ended.out


def test_bench_of_a_frozen_backbone_trains_the_rest() -> None:
    script, recipe = (
        REPO / "benchmarks/bench_frozen.py",
        REPO / "ds_configs/mask_rcnn_swin_tiny_16_adamw.json",
    )
    small = [
        "model.backbone.name=test_convnext",
        "data.size=[64,64]",
        "data.short_side=64",
        "norm.type=local",
    ]
    small += ["train_micro_batch_size_per_gpu=1", "model.fpn.channels=16", "model.backbone.drop_path_rate=0"]
    small += ["model.box_head.width=32", "zero_optimization.stage=2", "param_groups={}"]
    counts = []
    for setting in ("frozen", "recomputed"):
        command = [sys.executable, str(script), str(recipe), "--backbone", setting, "--steps", "1", *small]
        (ended,) = run_together([(command, environment())], fresh=False)
        assert ended.code == 0, ended.err
        counts.append([int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:param|train)", ended.out)])
        assert "CPU seconds per rank" in ended.out and f"backbone {setting}: " in ended.out
    (every, trained), (same, all_of_it) = counts
    assert every == same == all_of_it > trained > 0
