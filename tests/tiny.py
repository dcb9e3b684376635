"""A detector and a run small enough for tests, and real processes to run them in. Contains no tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from patience import Patience
from ranks import Forked, ForkRequest, ForkServer

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
MODELS: dict[str, dict[str, Any]] = {
    "mask_rcnn": MODEL,
    "cascade_mask_rcnn": {**MODEL, "type": "cascade_mask_rcnn"},
    "retinanet": {
        "type": "retinanet",
        "backbone": {"name": "test_resnet"},
        "fpn": {"channels": 16},
        "head": {
            "convs": 1,
            "anchor_sizes": [8, 16, 32, 48, 64],
            "pre_nms": 50,
            "detections": 10,
            "score_threshold": 0.0,
        },
    },
    "semantic_fpn": {
        "type": "semantic_fpn",
        "backbone": {"name": "test_resnet"},
        "fpn": {"channels": 16},
        "semantic_head": {"width": 32},
    },
    "upernet": {
        "type": "upernet",
        "backbone": {"name": "test_resnet"},
        # Without dropout, so that ranks and one process draw the same random numbers.
        "decode_head": {"width": 16, "pool_scales": [1, 2], "dropout": 0.0},
        "auxiliary_head": {"width": 16, "dropout": 0.0},
    },
    "panoptic_fpn": {
        **MODEL,
        "type": "panoptic_fpn",
        "semantic_head": {"width": 32},
        "merge": {"score": 0.1, "stuff_area": 16},
    },
}
"""A small section of each architecture."""
FORMATS: dict[str, str] = {
    "mask_rcnn": "coco",
    "cascade_mask_rcnn": "coco",
    "retinanet": "coco",
    "semantic_fpn": "semantic_png",
    "upernet": "semantic_png",
    "panoptic_fpn": "coco_panoptic",
}
"""The format of the data set for each architecture."""


def demo_section(data: Path, split: str, kind: str = "mask_rcnn") -> dict[str, Any]:
    """Return the section of a split of the demo set in `data`, in the format for an architecture."""
    own = {
        "coco": {"annotations": str(data / f"{split}.json")},
        "coco_panoptic": {"annotations": str(data / f"panoptic_{split}.json")},
        "semantic_png": {
            "labels": str(data / f"semantic_{split}"),
            "classes": str(data / "semantic_classes.json"),
        },
    }
    return {"format": FORMATS[kind], "images": str(data / split), **own[FORMATS[kind]]}


def tiny_run(data: Path, output: Path, kind: str = "mask_rcnn", **changes: Any) -> dict[str, Any]:
    """Return the JSON of a run of an architecture on the demo set in `data`, canvas 64 x 64.

    `changes` are by dotted path, with `__` for a dot.
    """
    raw: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "weight_decay": 0.05}},
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 0.0,
        "giantdet": {
            "model": MODELS[kind],
            "norm": {"type": "local"},
            "data": {
                "train": demo_section(data, "train", kind),
                "val": demo_section(data, "val", kind),
                "size": [64, 64],
                "short_side": 64,
                "max_objects": 8,
                "mask_frame": 28,
                "workers": 0,
            },
            # Without the report, which takes longer than the steps; tests/report has it.
            "train": {"steps": 2, "output": str(output), "log_every": 1, "report": False},
        },
    }
    for path, value in changes.items():
        set_path(raw, path.replace("__", "."), value)
    return raw


def demo_run(data: Path, output: Path, steps: int = 2) -> list[str]:
    """Return arguments of scripts/train.py: a few steps of a smaller demo, on the demo set in `data`."""
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
        "train.report=false",
        f"train.output={output}",
    ]


def set_path(raw: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path without changing dicts that other runs share."""
    *parents, last = path.split(".")
    for parent in parents:
        raw[parent] = dict(raw.get(parent, {}))
        raw = raw[parent]
    raw[last] = value


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def environment(**more: str) -> dict[str, str]:
    """Return a subprocess's environment: CPU, one thread, the repository's compiled ops, tests importable."""
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


ENVIRONMENT = environment()  # before any test changes its environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def same_run(one: Path, other: Path) -> None:
    """Assert that two runs had the same losses and exported the same weights, bit for bit."""
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
    """The exit code and output of a process."""

    code: int
    out: str
    err: str


Command = tuple[Sequence[str], dict[str, str]]
Process = subprocess.Popen[bytes] | Forked


def launch(script: Path, world: int, *arguments: object, fresh: bool = False) -> list[Ended]:
    """Run `script` as `world` ranks; return the exit code and output of each.

    Each is a real process: forked from one that has done the imports, or with `fresh` a new interpreter. A
    rank that fails ends the others after a moment, as a launcher does. Raises AssertionError if they hang.
    """
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(script), *map(str, arguments)]
    ranks = [environment(RANK=str(r), LOCAL_RANK=str(r), **group) for r in range(world)]
    return run_together([(command, rank) for rank in ranks], fresh)


def run_together(commands: Sequence[Command], fresh: bool = True) -> list[Ended]:
    """Run commands in their environments at the same time; return the exit code and output of each.

    Without `fresh`, scripts are forked as in `launch`. One that fails ends the others after a moment.
    Raises AssertionError if they hang.
    """
    if not fresh:  # all servers must have finished their imports, so that ranks start together
        servers = [_fork_server(number) for number in range(min(2, len(commands)))]
        assert all(each.is_ready() for each in servers)
    with tempfile.TemporaryDirectory() as folder:
        files = [[Path(folder, f"{i}.{name}") for name in ("out", "err")] for i in range(len(commands))]
        processes = []
        for number, (command, (out, err)) in enumerate(zip(commands, files, strict=True)):
            processes.append(_start(command, out, err, None if fresh else number))
        hung = not _wait(processes)
        texts = [[file.read_text(errors="replace") for file in pair] for pair in files]
    results = [Ended(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]
    assert not hung, f"{Path(commands[0][0][1]).name} hung\n{logs(results)}"
    return results


@cache
def _fork_server(number: int) -> ForkServer:
    """Return the first or the second server, started on first use.

    Neighbouring ranks come from different servers and so have different hash seeds, like processes that are
    started: ranks that iterate over a set in different orders hang here as they would in a real run.
    """
    return ForkServer(ENVIRONMENT)


def _start(command: Command, out: Path, err: Path, number: int | None) -> Process:
    """Start a new interpreter, or a fork with this number."""
    words, variables = command
    if number is not None:
        source = _fork_server(number % 2)
        if source.can_run(words, variables):
            return source.start(ForkRequest(words, variables, str(out), str(err)))
    with out.open("wb") as stdout, err.open("wb") as stderr:
        return subprocess.Popen(
            words,
            env=variables,
            cwd=REPO,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # so that a process's children, such as a compiler, end with it
        )


def _wait(ranks: Sequence[Process]) -> bool:
    """Wait until the ranks end; return False if they hung and were killed."""
    patience, failed = Patience(rank.pid for rank in ranks), False
    while any(rank.poll() is None for rank in ranks):
        if not failed and any(rank.returncode for rank in ranks):
            # The others may be about to end themselves, or wait for the one that failed.
            patience, failed = Patience((rank.pid for rank in ranks), still=15.0, limit=300.0), True
        if patience.has_ended():
            for rank in ranks:
                if rank.poll() is None:
                    os.killpg(rank.pid, signal.SIGKILL)
            while any(rank.poll() is None for rank in ranks):
                time.sleep(0.01)
            return failed  # not a hang: the others waited for the failed one
        time.sleep(0.05)
    return True


def logs(results: list[Ended]) -> str:
    return "\n".join(
        f"--- rank {r}, exit code {end.code}\n{end.out[-3000:]}\n{end.err[-6000:]}"
        for r, end in enumerate(results)
    )


def launch_ok(script: Path, world: int, *arguments: object, fresh: bool = False) -> list[Ended]:
    """`launch`, but assert that every rank ends with exit code 0."""
    results = launch(script, world, *arguments, fresh=fresh)
    assert all(end.code == 0 for end in results), logs(results)
    return results


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """Mount a file system in memory; skip the test if that is not possible."""
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
