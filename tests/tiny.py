"""A detector and a run small enough for tests, and real processes to run them in. No test in here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

REPO = Path(__file__).resolve().parents[1]

MODEL: dict[str, Any] = {
    "backbone": {"name": "test_resnet"},
    "fpn": {"channels": 16},
    "rpn": {
        "anchor_sizes": [8, 16, 32, 48, 64],
        "batch_per_image": 32,
        "pre_nms_train": 50,
        "pre_nms_test": 50,
        "post_nms_train": 20,
        "post_nms_test": 20,
    },
    "box_head": {"width": 32, "batch_per_image": 16, "detections": 10, "score_threshold": 0.0},
    "mask_head": {"width": 16, "convs": 1, "slots": 4},
}


def tiny_run(data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run's JSON on the demo set in `data` (canvas 64 x 64); `changes` by dotted path, `__` for a dot."""
    raw: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "weight_decay": 0.05}},
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 0.0,
        "giantdet": {
            "model": MODEL,
            "norm": {"type": "local"},
            "data": {
                "train": {"annotations": str(data / "train.json"), "images": str(data / "train")},
                "val": {"annotations": str(data / "val.json"), "images": str(data / "val")},
                "size": [64, 64],
                "short_side": 64,
                "max_objects": 8,
                "mask_frame": 28,
                "workers": 0,
            },
            "train": {"steps": 2, "output": str(output), "log_every": 1},
        },
    }
    for path, value in changes.items():
        set_path(raw, path.replace("__", "."), value)
    return raw


def demo_run(data: Path, output: Path, steps: int = 2) -> list[str]:
    """Arguments of scripts/train.py: a few steps of the demo, smaller, on the demo set in `data`."""
    return [
        "--deepspeed_config",
        str(REPO / "ds_configs/demo.json"),
        "model.backbone.name=test_resnet",
        "data.size=[64,64]",
        "data.short_side=64",
        f"data.train.annotations={data / 'train.json'}",
        f"data.train.images={data / 'train'}",
        f"data.val.annotations={data / 'val.json'}",
        f"data.val.images={data / 'val'}",
        f"train.steps={steps}",
        "train.log_every=1",
        f"train.output={output}",
    ]


def set_path(raw: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path without touching the dicts that other runs share."""
    *parents, last = path.split(".")
    for parent in parents:
        raw[parent] = dict(raw.get(parent, {}))
        raw = raw[parent]
    raw[last] = value


def environment(**more: str) -> dict[str, str]:
    """Of a subprocess: CPU, one thread, compiled ops where the repository keeps them, tests importable."""
    kept = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    return kept | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(REPO / "runs/torch_extensions")),
        "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
        "PYTHONWARNINGS": "ignore",
        **more,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def same_run(one: Path, other: Path) -> None:
    """Assert that two runs had the same losses and exported the same weights, to the last bit."""
    import torch
    from safetensors.torch import load_file

    from giantdet.engine.metrics import read_metrics

    losses = [
        [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        for run in (one, other)
    ]
    assert losses[0] == losses[1] and len(losses[0]) > 1
    mine, theirs = (load_file(run / "export/model.safetensors") for run in (one, other))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


class Ended(NamedTuple):
    """What a process left behind."""

    code: int
    out: str
    err: str


def launch(script: Path, world: int, *arguments: object, timeout: float = 400.0) -> list[Ended]:
    """Run `script` as `world` ranks, and what each left behind.

    A rank that fails ends the others after a moment, as a launcher does. AssertionError on a time-out.
    """
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(script), *map(str, arguments)]
    ranks = [environment(RANK=str(r), LOCAL_RANK=str(r), **group) for r in range(world)]
    return run_together([(command, rank) for rank in ranks], timeout)


def run_together(
    commands: Sequence[tuple[Sequence[str], dict[str, str]]], timeout: float = 240.0
) -> list[Ended]:
    """Run commands in their environments at the same time, and what each left behind.

    One that fails ends the others after a moment. AssertionError on a time-out.
    """
    with ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in "oe"] for _ in commands]
        processes = [
            subprocess.Popen(
                command,
                env=variables,
                cwd=REPO,
                stdout=out,
                stderr=err,
                start_new_session=True,  # so that what a process starts, a compiler say, ends with it
            )
            for (command, variables), (out, err) in zip(commands, files, strict=True)
        ]
        in_time = _wait(processes, timeout)
        for file in (file for pair in files for file in pair):
            file.seek(0)
        texts = [[file.read() for file in pair] for pair in files]
    results = [Ended(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]
    assert in_time, f"{Path(commands[0][0][1]).name} hung for {timeout:.0f} s\n{logs(results)}"
    return results


def _wait(ranks: list[subprocess.Popen[bytes]], timeout: float) -> bool:
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in ranks):
        if any(process.returncode for process in ranks):
            end = min(end, time.monotonic() + 15)
        if time.monotonic() > end:
            failed = any(process.returncode for process in ranks)
            for process in ranks:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            return failed  # not a hang of its own: the others waited for the one that failed
        time.sleep(0.05)
    return True


def logs(results: list[Ended]) -> str:
    return "\n".join(
        f"--- rank {r}, exit code {end.code}\n{end.out[-3000:]}\n{end.err[-6000:]}"
        for r, end in enumerate(results)
    )


def launch_ok(script: Path, world: int, *arguments: object, timeout: float = 400.0) -> list[Ended]:
    """`launch`, and every rank must end with exit code 0."""
    results = launch(script, world, *arguments, timeout=timeout)
    assert all(end.code == 0 for end in results), logs(results)
    return results


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory; skips the test where none may be mounted."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
