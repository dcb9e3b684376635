#!/usr/bin/env python
"""Qualify a machine with a GPU for giantdet: correctness, speed, memory and a small training, in one command.

    python scripts/qualify_gpu.py                           # all checks, at most 8 minutes, no network
    python scripts/qualify_gpu.py --only correct speed
    python scripts/qualify_gpu.py --device cpu --toy        # all checks at toy sizes, to test the checks

Needs torch and torchvision with CUDA, timm, deepspeed, pycocotools, einops, safetensors and pydantic. Without
network access, bring wheels of the missing packages, usually deepspeed, hjson, msgpack, pycocotools,
pydantic, pydantic-core, annotated-types and typing-inspection. giantdet itself may be on PYTHONPATH only.

Each group of checks runs in its own process, so that a CUDA error ends only its group. All start at once and
prepare, which includes compiling; meanwhile the correctness checks run, and then the other groups, one after
another. A row is written to OUTPUT/rows.jsonl as soon as it is known: a time-out loses nothing. The exit
code is 1 if a row failed or a group did not end.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
# Time limit of each group in seconds, within its turn.
GROUPS = {"correct": 90, "speed": 90, "frozen": 40, "norms": 30, "giants": 120, "agvm": 60, "whole": 120}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes, to test the checks themselves")
    parser.add_argument("--output", type=Path, default=Path("runs/qualify"))
    parser.add_argument("--seconds", type=float, default=480, help="for all groups together")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    args = parser.parse_args()
    return _group(args) if args.group else _all(args)


def _all(args: argparse.Namespace) -> int:
    started = time.monotonic()
    args.output.mkdir(parents=True, exist_ok=True)
    report = (args.output / "rows.jsonl").open("w")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(REPO / "benchmarks"), str(REPO), os.environ.get("PYTHONPATH", "")]
        ),
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": args.device,
    }
    command = [sys.executable, __file__, "--device", args.device, "--output", str(args.output)]
    command += ["--toy"] * args.toy
    waiting = {
        name: subprocess.Popen(
            [*command, "--group", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(args.output / f"{name}.log").open("w"),
            text=True,
            env=environment,
        )
        for name in args.only
    }
    failed = 0
    print("| check | | found |\n|---|---|---|", flush=True)

    def say(group: str, check: str, passed: bool | None, found: str) -> None:
        nonlocal failed
        failed += passed is False
        mark = {True: "passed", False: "FAILED", None: ""}[passed]
        seconds = time.monotonic() - started
        print(f"| {check} | {mark} | {found} |", flush=True)
        row = {"group": group, "check": check, "passed": passed, "found": found, "seconds": round(seconds, 1)}
        report.write(json.dumps(row) + "\n")
        report.flush()

    ready = False
    for name, process in waiting.items():
        if name != "correct" and not ready:
            timed = [other for key, other in waiting.items() if key != "correct"]
            _wait_until_ready(timed, started + args.seconds)
            ready = True
        left = args.seconds - (time.monotonic() - started)
        assert process.stdin is not None and process.stdout is not None
        if left < 5 or process.poll() is not None:
            reason = "no time left" if left < 5 else f"exited at its start, see {name}.log"
            say(name, f"{name}: group", False, reason)
            process.kill()
            continue
        # A toy run may share its CPU with others.
        timer = threading.Timer(left if args.toy else min(left, GROUPS[name]), process.kill)
        timer.start()
        turn = time.monotonic()
        process.stdin.write("go\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("ROW "):
                row = json.loads(line[4:])
                say(name, row["check"], row["passed"], row["found"])
        code = process.wait()
        timer.cancel()
        took = time.monotonic() - turn
        if code:
            say(name, f"{name}: group", False, f"exited with code {code} after {took:.0f} s, see {name}.log")
        else:
            say(name, f"{name}: group", None, f"{took:.0f} s")
    print(f"\n{failed} failed, {time.monotonic() - started:.0f} s; rows in {args.output / 'rows.jsonl'}")
    return int(failed > 0)


def _wait_until_ready(processes: list[subprocess.Popen[str]], end: float) -> None:
    """Wait for the processes' first lines, so that nothing is timed while others compile."""
    timer = threading.Timer(max(0.0, end - time.monotonic()), lambda: [p.kill() for p in processes])
    timer.start()
    for process in processes:
        assert process.stdout is not None
        if not process.stdout.readline():  # the process has exited
            process.wait()
    timer.cancel()


def _group(args: argparse.Namespace) -> int:
    """Run one group when the parent says so; rows go to stdout, everything else to stderr."""
    rows, sys.stdout = sys.stdout, sys.stderr
    import torch
    from qualify.common import Setting

    module = importlib.import_module(f"qualify.{args.group}")
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    setting = Setting(device, args.toy, args.output)
    module.prepare(setting)
    print("READY", file=rows, flush=True)
    sys.stdin.readline()
    for row in module.checks(setting):
        print("ROW " + json.dumps(row._asdict()), file=rows, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
