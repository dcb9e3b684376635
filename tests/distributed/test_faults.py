"""Failures in real runs on two ranks: stop signals, killed processes, non-finite losses and gradients."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from patience import wait_until
from safetensors.torch import load_file
from tiny import Ended, environment, free_port, launch, launch_ok, logs, tiny_run

from giantdet.checkpoint.files import scan
from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.loader import train_loader
from giantdet.engine import faults
from giantdet.engine.faults import listen, stop_asked, stop_reason
from giantdet.engine.metrics import read_metrics
from giantdet.errors import StoppedError
from giantdet.export import export_checkpoint, read_export_config

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "scripts/train.py"
WORKER = Path(__file__).with_name("worker_faults.py")
STEPS = 40


def write(folder: Path, name: str, data: Path, **changes: Any) -> Path:
    raw = tiny_run(data, folder / name, **changes)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(raw))
    return path


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return [path for path, _ in scan(run / "checkpoints")]


# Losses and gradients that are not finite

BAD_STEP = 3
BAD_STEP_RUNS = {
    "nan0": "nan",
    "gradient0": "gradient",
    "inf1": "inf",
    "gradient2": "gradient",
    "nan3": "nan",
}


class Corrupted(NamedTuple):
    folder: Path
    ends: list[Ended]


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Corrupted:
    """One launch: a run with one non-finite step at each ZeRO stage, and one in which they never end."""
    folder = tmp_path_factory.mktemp("corrupted")
    arguments = []
    for name, kind in BAD_STEP_RUNS.items():
        stage = int(name[-1])
        path = write(
            folder,
            name,
            demo_data,
            zero_optimization__stage=stage,
            giantdet__train__steps=5,
            giantdet__train__save_every=1,
            giantdet__train__keep=5,
            giantdet__norm={"type": "cgbn" if stage == 2 else "local"},
            giantdet__ema={"enabled": True, "decay": 0.5},
            giantdet__agvm={"enabled": True, "interval": 1, "start_step": 1, "momentum": 0.5},
        )
        arguments.append(f"{path}:{kind}:{BAD_STEP}:{BAD_STEP}")
    path = write(
        folder,
        "endless",
        demo_data,
        giantdet__train__steps=9,
        giantdet__train__max_skipped_steps=3,
        giantdet__train__save_every=2,
    )
    return Corrupted(folder, launch(WORKER, 2, *arguments, f"{path}:nan:3:99"))


@pytest.mark.parametrize("name", BAD_STEP_RUNS)
def test_a_non_finite_step_is_skipped(
    corrupted: Corrupted, demo_data: Path, tmp_path: Path, name: str
) -> None:
    """Weights and statistics of all ranks stay the same, bit for bit, and training continues afterwards."""
    run, kind = corrupted.folder / name, BAD_STEP_RUNS[name]
    assert (run / "export").is_dir(), logs(corrupted.ends)
    config = read_export_config(run / "export")
    weights = {}
    for checkpoint in checkpoints(run):
        export_checkpoint(checkpoint, tmp_path / checkpoint.name, config)
        weights[int(checkpoint.name[5:])] = load_file(tmp_path / checkpoint.name / "model.safetensors")
    assert all(torch.isfinite(t).all() for state in weights.values() for t in state.values())

    def same(one: int, other: int) -> bool:
        return all(torch.equal(t, weights[other][name]) for name, t in weights[one].items())

    assert same(BAD_STEP - 1, BAD_STEP) and not same(1, 2) and not same(BAD_STEP, 4) and not same(4, 5)
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "scores" not in line]
    assert ["loss" in line for line in lines] == [step != BAD_STEP for step in range(1, 6)]
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 1, 1, 1]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    skipped = [line for line in corrupted.ends[0].err.splitlines() if f"step {BAD_STEP} is skipped" in line]
    mine = skipped[list(BAD_STEP_RUNS).index(name)]
    ids = [images_of(corrupted.folder / f"{name}.json", demo_data, rank, BAD_STEP) for rank in (0, 1)]
    expected = sorted(ids[0] + ids[1]) if kind == "gradient" else sorted(ids[1])
    assert f"(images {', '.join(map(str, expected))})" in mine
    assert ("a gradient is not finite" if kind == "gradient" else f"the loss is {kind}") in mine


def images_of(path: Path, data: Path, rank: int, step: int) -> list[int]:
    """The image ids of one rank's micro-batch, taken from the loader itself."""
    raw = json.loads(path.read_text())
    config = DataConfig.model_validate({**raw["giantdet"]["data"], "workers": 0})
    dataset = CocoDataset(data / "train.json", data / "train")
    micro_batch = raw["train_micro_batch_size_per_gpu"]
    loader = train_loader(dataset, config, micro_batch, rank, 2, start_micro_step=step - 1)
    return [int(i) for i in next(loader).image_ids_B]


def test_too_many_non_finite_steps_in_a_row_stop_the_run(corrupted: Corrupted) -> None:
    ends = corrupted.ends
    assert [end.code for end in ends] == [3, 3], logs(ends)
    stopped = [line for end in ends for line in end.err.splitlines() if "giantdet: stopped" in line]
    assert len(stopped) == 1 and "3 steps in a row were skipped, the last: step 5 " in stopped[0]
    assert "Traceback" not in ends[0].err + ends[1].err
    assert checkpoints(corrupted.folder / "endless")[-1].name == "step_4"


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, demo_data: Path) -> None:
    """Loss and gradients are finite; the optimizer step overflows the weights."""
    path = write(
        tmp_path,
        "overflow",
        demo_data,
        optimizer={"type": "SGD", "params": {"lr": 100.0, "weight_decay": 1e38}},
        giantdet__train__save_every=1,
    )
    (ended,) = launch(WORKER, 1, f"{path}:nan:9:9")
    assert ended.code == 3, logs([ended])
    assert (
        "after step 1 the weight of " in ended.err and "is not finite: no checkpoint is written" in ended.err
    )
    assert checkpoints(tmp_path / "overflow") == []


# Ctrl-C


def test_ctrl_c_saves_and_ends_a_run_without_a_launcher(tmp_path: Path, demo_data: Path) -> None:
    path = write(tmp_path, "run", demo_data, giantdet__train__steps=STEPS, giantdet__train__save_every=0)
    command = [sys.executable, "-m", "giantdet.cli", "train", "--config", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment(), text=True) as process:
        metrics = tmp_path / "run/metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text(), [process.pid], "step 1")
        process.send_signal(signal.SIGINT)
        err = process.communicate()[1]
    assert process.returncode == StoppedError.exit_code, err
    assert "stopping after this step; press Ctrl-C again to stop at once" in err
    assert "giantdet: stopped: SIGINT after step" in err and "Traceback" not in err
    steps = len(metrics.read_text().splitlines())
    assert [found.name for found in checkpoints(tmp_path / "run")] == [f"step_{steps}"] and steps < STEPS


def test_a_second_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_asked", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        listen()
        assert not stop_asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_asked() and stop_reason() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Signals and killed processes, under the deepspeed launcher


class Job:
    """A run under the deepspeed launcher, in its own process session."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.output = Path(json.loads(path.read_text())["giantdet"]["train"]["output"])
        self.path = path
        self.log = folder / f"{path.stem}.log"
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
        command += [f"--master_port={free_port()}", str(SCRIPT), "--deepspeed_config", str(path)]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                cwd=REPO,
                start_new_session=True,
            )

    def reach(self, step: int) -> None:
        """Wait until this many steps are done."""
        self.until(lambda: self.steps() >= step, f"step {step}")

    def steps(self) -> int:
        metrics = self.output / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            wait_until(condition, [self.process.pid], what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()}") from None

    def processes(self, word: str) -> list[int]:
        """The ids of this job's processes whose command line contains the word; parents first."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                line = (entry / "cmdline").read_text() if entry.name.isdigit() else ""
            except (OSError, ProcessLookupError):
                continue
            if str(self.path) in line and word in line:
                found.append(int(entry.name))
        return sorted(found)

    def ranks(self) -> list[int]:
        """The ids of the ranks, without their data workers, which have the same command line."""
        every = self.processes("--local_rank")
        return [pid for pid in every if parent(pid) not in every and parent(pid) in self.processes("launch")]

    def wait(self) -> Ended:
        self.until(lambda: self.process.poll() is not None, "end")
        return Ended(self.process.returncode, self.log.read_text(), "")

    def close(self) -> None:
        for pid in self.processes(""):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Path], Job]]:
    """A function that starts a run, or resumes it."""
    started: list[Job] = []

    def job(path: Path) -> Job:
        started.append(Job(path, tmp_path))
        return started[-1]

    yield job
    for one in started:
        one.close()


def test_a_run_survives_signals_and_killed_processes(
    start: Callable[[Path], Job], demo_data: Path, tmp_path: Path
) -> None:
    """After several failures, each resumed by the same command, the weights equal an undisturbed run's."""
    settings = {"zero_optimization__stage": 2, "giantdet__norm": {"type": "local"}}
    settings |= {"giantdet__train__steps": STEPS, "giantdet__train__save_every": 5}
    undisturbed, faults = (
        write(tmp_path, name, demo_data, **settings, giantdet__data__workers=1)
        for name in ("undisturbed", "faults")
    )
    launch_ok(SCRIPT, 2, "--deepspeed_config", undisturbed)
    step = 0
    for fault in (signal_a_rank, signal_the_launcher, kill_the_launcher, kill_a_rank):
        job = start(faults)
        job.reach(step + 3)
        fault(job)
        assert job.processes("train.py") == [] and scan(job.output / "checkpoints")
        assert ("resuming after step" in job.log.read_text()) == (step > 0)
        step = job.steps()
    job = start(faults)
    job.reach(step + 2)
    kill_a_data_worker(job)
    runs = [job.output.with_name(name) for name in ("undisturbed", "faults")]
    one, other = (load_file(run / "export/model.safetensors") for run in runs)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    lines = read_metrics(job.output / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))


def assert_stopped_with_a_checkpoint(job: Job) -> None:
    ended = job.wait()
    assert ended.code != 0
    stopped = [line for line in ended.out.splitlines() if "giantdet: stopped:" in line]
    assert len(stopped) == 1 and "the same command resumes from" in stopped[0], ended.out
    step = int(stopped[0].split("after step ")[1].split(";")[0])
    assert checkpoints(job.output)[-1].name == f"step_{step}" and job.steps() == step < STEPS


def signal_a_rank(job: Job) -> None:
    """SIGUSR1, which Slurm sends before the time limit; all ranks stop after the same step."""
    os.kill(job.ranks()[1], signal.SIGUSR1)
    assert_stopped_with_a_checkpoint(job)


def signal_the_launcher(job: Job) -> None:
    """SIGTERM, which a scheduler sends."""
    os.kill(job.processes("deepspeed.launcher.launch")[0], signal.SIGTERM)
    assert_stopped_with_a_checkpoint(job)


def kill_the_launcher(job: Job) -> None:
    """Nobody could stop the orphaned ranks any more, so they save and exit."""
    os.kill(job.processes("deepspeed.launcher.launch")[0], signal.SIGKILL)
    job.until(lambda: job.processes("train.py") == [], "end of the ranks")
    assert "giantdet: stopped: SIGTERM after step" in job.log.read_text()
    assert checkpoints(job.output)[-1].name == f"step_{job.steps()}"


def kill_a_rank(job: Job) -> None:
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.wait().code != 0


def kill_a_data_worker(job: Job) -> None:
    """The run continues and reports it."""
    ranks = job.ranks()
    worker = next(pid for pid in job.processes("train.py") if parent(pid) == ranks[0])
    os.kill(worker, signal.SIGKILL)
    ended = job.wait()
    assert ended.code == 0 and "a data loader worker died" in ended.out, ended.out
    assert [line for line in read_metrics(job.output / "metrics.jsonl") if line.get("worker_restarts") == 1]
