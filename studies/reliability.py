"""Run the long trials of docs/reliability.md: many steps, many kills. Each takes minutes on CPUs.

python studies/reliability.py soak --steps 2000    # memory, file handles and step time of 2 ranks
python studies/reliability.py kills --times 20     # kill at random moments, resume, compare the weights
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

PORT = 29_710
REPO = Path(__file__).resolve().parents[1]
SMALL = [
    "model.backbone.name=test_resnet",
    "model.fpn.channels=16",
    "model.rpn.anchor_sizes=[8,16,32,48,64]",
    "model.rpn.batch_per_image=32",
    "model.rpn.pre_nms_train=50",
    "model.rpn.post_nms_train=20",
    "model.box_head.width=32",
    "model.box_head.batch_per_image=16",
    "model.mask_head.width=16",
    "model.mask_head.slots=4",
    "data.size=[64,64]",
    "data.short_side=64",
    "data.val=null",
    "data.workers=1",
    "train_batch_size=4",
    "train_micro_batch_size_per_gpu=2",
    "gradient_accumulation_steps=1",
    "train.epochs=null",
    "norm.type=cgbn",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trial", choices=["soak", "kills"])
    parser.add_argument("--steps", type=int, default=2000, help="length of the run; default: 2000")
    parser.add_argument("--times", type=int, default=20, help="number of kills; default: 20")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random kill times")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage; default: 2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make = ["-m", "giantdet.cli", "make-demo-data", str(data), "--size", "64"]
        subprocess.run(
            [sys.executable, *make, "--train-images", "200", "--val-images", "8"], check=True, cwd=REPO
        )
        trial = soak if options.trial == "soak" else kills
        print(json.dumps(trial(options, Path(folder), data), indent=2))


class Job:
    """A run of two ranks under the deepspeed launcher."""

    def __init__(self, output: Path, data: Path, *changes: str) -> None:
        self.output = output
        settings = [
            f"data.train.annotations={data}/train.json",
            f"data.train.images={data}/train",
            f"train.output={output}",
            *SMALL,
            *changes,
        ]
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
        script = ["scripts/train.py", "--deepspeed_config", "ds_configs/demo.json", *settings]
        self.log = output.with_suffix(".log")
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                [*command, f"--master_port={PORT}", *script],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=REPO,
            )

    def find(self, word: str) -> list[int]:
        """Return the processes of this run whose command line contains the word."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                line = (entry / "cmdline").read_text() if entry.name.isdigit() else ""
            except OSError:
                continue
            if f"train.output={self.output}\0" in line and word in line:
                found.append(int(entry.name))
        return sorted(found)

    def ranks(self) -> list[int]:
        launchers = self.find("deepspeed.launcher.launch")
        return [pid for pid in self.find("--local_rank") if parent(pid) in launchers]

    def step(self) -> int:
        """Return the last logged step, 0 if there is none."""
        metrics = self.output / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines and lines[-1].endswith("}") else 0

    def wait_for_the_end(self) -> int:
        code = self.process.wait()
        while self.find("scripts/train.py"):
            time.sleep(0.1)
        return code


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def soak(options: argparse.Namespace, folder: Path, data: Path) -> dict[str, Any]:
    """Return means over the first fifth of the run, after a warmup of a tenth, and over its last fifth."""
    every = max(1, options.steps // 20)
    stage = f"zero_optimization.stage={options.stage}"
    job = Job(
        folder / "soak",
        data,
        stage,
        f"train.steps={options.steps}",
        "train.log_every=10",
        f"train.save_every={every}",
    )
    samples: list[tuple[int, float, int]] = []
    metrics = job.output / "metrics.jsonl"
    while job.process.poll() is None:
        time.sleep(1.0)
        ranks = job.ranks()
        if metrics.exists() and len(ranks) == 2:
            try:
                step = json.loads(metrics.read_text().splitlines()[-1])["step"]
                memory = sum(resident(pid) for pid in ranks) / 2**20
                handles = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in ranks)
            except (OSError, IndexError):
                continue
            samples.append((step, memory, handles))
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = [(line["step"], 4 / line["images_per_second"]) for line in lines if "loss" in line]

    def part(values: list[tuple[int, float]], first: float, last: float) -> float:
        return fmean(v for step, v in values if first * options.steps <= step <= last * options.steps)

    report: dict[str, Any] = {"exit_code": job.process.returncode, "steps": lines[-1]["step"]}
    for name, values in (
        ("memory_mib_of_2_ranks", [(s, m) for s, m, _ in samples]),
        ("file_handles_of_2_ranks", [(s, float(h)) for s, _, h in samples]),
        ("seconds_per_step", seconds),
    ):
        report[name] = {"first": round(part(values, 0.1, 0.3), 3), "last": round(part(values, 0.8, 1.0), 3)}
    return report


def resident(pid: int) -> int:
    """Return the bytes of the process's own resident memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def kills(options: argparse.Namespace, folder: Path, data: Path) -> dict[str, Any]:
    """Send SIGKILL to a rank, or to the launcher and all its children, at random moments of one run."""
    import torch
    from safetensors.torch import load_file

    steps, stage = 10 * options.times, f"zero_optimization.stage={options.stage}"
    settings = [stage, f"train.steps={steps}", "train.log_every=1", "train.save_every=3"]
    undisturbed = Job(folder / "undisturbed", data, *settings)
    if undisturbed.wait_for_the_end():
        sys.exit(undisturbed.log.read_text())
    rng, done, starts = random.Random(options.seed), [], 0
    while len(done) < options.times:
        job, starts = Job(folder / "killed", data, *settings), starts + 1
        while not job.ranks() and job.process.poll() is None:
            time.sleep(0.05)
        steps_more, seconds = rng.randint(0, 12), rng.uniform(0.0, 1.0)
        begun = first = None  # the first logged line tells where this start resumed
        while steps_more and job.process.poll() is None:
            now = job.step()
            begun = now if begun is None else begun
            first = now if first is None and now != begun else first
            if first is not None and now >= first + steps_more - 1:
                break
            time.sleep(0.01)
        time.sleep(seconds)
        if job.process.poll() is not None:
            break  # the run ended before the kill
        victim = rng.choice(["rank 0", "rank 1", "everything"])
        ranks = job.ranks()
        targets = job.find("train.output") if victim == "everything" else ranks[int(victim[-1]) :][:1]
        for pid in targets:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        job.wait_for_the_end()
        done.append(f"{victim} after {steps_more} steps and {seconds:.1f} s")
    last = Job(folder / "killed", data, *settings)
    code = last.wait_for_the_end()
    one, other = (load_file(folder / name / "export/model.safetensors") for name in ("undisturbed", "killed"))
    different = [name for name in one if not torch.equal(one[name], other[name])]
    log = last.log.read_text()
    return {
        "steps": steps,
        "kills": done,
        "starts": starts + 1,
        "resumed_after": [part.split(" ")[0] for part in log.split("resuming after step ")[1:]],
        "exit_code": code,
        "tensors": len(one),
        "different": different,
    }


if __name__ == "__main__":
    main()
