"""The loader's and the evaluation's rates, and the demo's whole training."""

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
    """Make the demo's images, while other groups use the GPU."""
    images = setting.pick((2000, 200), (16, 4))
    make_demo(folder(setting) / "data", *images)


def checks(setting: Setting) -> Iterator[Row]:
    yield from demo(setting)
    yield from loader(setting)


def overrides(setting: Setting) -> list[str]:
    data = folder(setting) / "data"
    found = [f"train.output={folder(setting)}"]
    for split in ("train", "val"):
        found += [f"data.{split}.annotations={data / split}.json", f"data.{split}.images={data / split}"]
    return found + setting.pick([], ["train.steps=4", "train_batch_size=4", "data.workers=0"])


def demo(setting: Setting) -> Iterator[Row]:
    """`scripts/train.py` with ds_configs/demo.json, as a user starts it, on one process."""
    command = [sys.executable, str(REPO / "scripts" / "train.py")]
    command += ["--deepspeed_config", str(REPO / "ds_configs" / "demo.json"), *overrides(setting)]
    started = time.monotonic()
    log = folder(setting) / "train.log"
    with log.open("w") as output:
        ended = subprocess.run(command, cwd=REPO, stdout=output, stderr=subprocess.STDOUT, env=os.environ)
    took = time.monotonic() - started
    if ended.returncode:
        text = " ".join(log.read_text().split()[-60:])
        yield Row("demo", False, f"ended with {ended.returncode} after {took:.0f} s: {text}")
        return
    scores = json.loads((folder(setting) / "scores.json").read_text())
    lines = [json.loads(line) for line in (folder(setting) / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    ap50 = {task: found["AP50"] for task, found in scores.items()}
    keys = ("images_per_second", "data_share", "memory_gib")
    yield Row(
        "demo",
        None if setting.toy else min(ap50.values()) > LEAST_AP50,
        f"{took:.0f} s in all; AP50 {ap50}; {', '.join(f'{key} {last[key]:.3g}' for key in keys)}",
    )


def loader(setting: Setting) -> Iterator[Row]:
    """Images/s of one worker: PNG files of 128 pixels, resized to a canvas of 1024, masks on."""
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
