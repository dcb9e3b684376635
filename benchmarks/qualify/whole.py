"""The speed of the loader and of the evaluation, and a whole training of the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from qualify.common import REPO, Row, Setting

from giantdet.config.types import DataConfig
from giantdet.data.dataset import open_dataset
from giantdet.data.demo import make_demo
from giantdet.data.loader import train_loader

LEAST_AP50 = 0.7


def folder(setting: Setting) -> Path:
    return setting.output / "demo"


def prepare(setting: Setting) -> None:
    """Generate the demo's images, while other groups use the GPU."""
    images = setting.pick((2000, 200), (16, 4))
    make_demo(folder(setting) / "data", *images)


def checks(setting: Setting) -> Iterator[Row]:
    yield from demo(setting)
    yield from loader(setting)


def demo(setting: Setting) -> Iterator[Row]:
    """Train ds_configs/demo.json as a user does: its first steps in all modes, then everything as a graph."""
    ways: dict[str, list[str]] = {"eager": []}
    if setting.device.type == "cuda":
        ways |= {"CUDA graph": ["train.cuda_graph=true"], "compiled": ["train.compile=true"]}
    if len(ways) > 1:
        yield from first_steps(setting, ways)
    yield from whole(setting, ways.get("CUDA graph", []))


def first_steps(setting: Setting, ways: dict[str, list[str]]) -> Iterator[Row]:
    """Compare the losses of a few steps in all modes with eager's."""
    steps = setting.pick(20, 2)
    # At once, because only losses are compared, not times.
    short = ["train.log_every=1", f"train.steps={steps}", "data.val=null"]
    runs = {name: train(setting, name, [*short, *changes]) for name, changes in ways.items()}
    losses = {name: [line["loss"] for line in lines_of(run)] for name, run in runs.items()}
    reference = losses["eager"]
    for name, found in losses.items():
        if len(found) != steps:
            yield Row(f"demo, {name}", False, f"exited early, see {folder(setting) / name}.log")
        elif name != "eager":
            apart = [abs(a - b) / b for a, b in zip(found, reference, strict=True)]
            text = f"losses of steps 1 and {steps} are {apart[0]:.1e} and {apart[-1]:.1e} from eager's"
            yield Row(f"demo, {name}", apart[0] < 1e-3 and max(apart) < 0.1, text)


def whole(setting: Setting, changes: list[str]) -> Iterator[Row]:
    started = time.monotonic()
    run = train(setting, "demo", [*changes, *setting.pick([], ["train.steps=4"])])
    run.wait()
    took = time.monotonic() - started
    path = folder(setting) / "demo" / "scores.json"
    if not path.exists():
        yield Row("demo", False, f"ended with {run.returncode}, see {folder(setting) / 'demo'}.log")
        return
    ap50 = {task: found["AP50"] for task, found in json.loads(path.read_text()).items()}
    last = lines_of(run)[-1]
    keys = ("images_per_second", "data_share", "memory_gib")
    yield Row(
        "demo",
        None if setting.toy else min(ap50.values()) > LEAST_AP50,
        f"{took:.0f} s in all; AP50 {ap50}; {', '.join(f'{key} {last[key]:.3g}' for key in keys)}",
    )


class Run(subprocess.Popen[str]):
    """A training in its own process, and its output folder."""

    output: Path


def train(setting: Setting, name: str, changes: list[str]) -> Run:
    """Start `scripts/train.py` in one process."""
    output = folder(setting) / name
    data = folder(setting) / "data"
    command = [sys.executable, str(REPO / "scripts" / "train.py")]
    command += ["--deepspeed_config", str(REPO / "ds_configs" / "demo.json"), f"train.output={output}"]
    for split in ("train", "val"):
        if "data.val=null" not in changes or split == "train":
            command += [
                f"data.{split}.annotations={data / split}.json",
                f"data.{split}.images={data / split}",
            ]
    if setting.toy:
        command += ["train_batch_size=4", "data.workers=0"]
    log = output.with_suffix(".log").open("w")
    environment = {key: value for key, value in os.environ.items() if key not in ("MASTER_PORT", "RANK")}
    run = Run(
        [*command, *changes], cwd=REPO, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment
    )
    run.output = output
    return run


def lines_of(run: Run) -> list[dict[str, float]]:
    """Wait for a run and return its log lines with losses."""
    run.wait()
    path = run.output / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if "loss" in line]


def loader(setting: Setting) -> Iterator[Row]:
    """Images/s of one worker: PNG files of 128 pixels, resized to a canvas of 1024, with masks."""
    data = folder(setting) / "data"
    section = {
        "train": {"annotations": str(data / "train.json"), "images": str(data / "train")},
        "size": setting.pick([1024, 1024], [128, 128]),
        "short_side": setting.pick(1024, 128),
        "workers": 1,
    }
    config = DataConfig.model_validate(section)
    assert config.train is not None
    batches = train_loader(
        open_dataset(config.train), config, 4, 0, 1, pin_memory=setting.device.type == "cuda"
    )
    next(batches)
    count = setting.pick(25, 2)
    started = time.perf_counter()
    for _ in range(count):
        next(batches).to(setting.device)
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    rate = 4 * count / (time.perf_counter() - started)
    batches.close()
    yield Row("loader", None, f"{rate:.0f} images/s of one worker")
