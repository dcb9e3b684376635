"""`giantdet doctor`: check that every rank has what a run needs and that the ranks reach each other.

Each rank collects facts about its machine; the main rank compares them and prints one line per subject, with
a sentence of advice if something is wrong. Everything that waits for other ranks has a time-out.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from packaging.requirements import Requirement

from giantdet.distributed import comm

SHOWN = ("torch", "deepspeed", "timm")
# GiB or counts below which a line warns; GB/s below which a network is not worth a second host.
LEAST_DISK, LEAST_SHARED_MEMORY, LEAST_OPEN_FILES = 20.0, 1.0, 1024
LEAST_BANDWIDTH = {"nccl": 1.0, "gloo": 0.1}
VISIBLE_SECONDS = 10.0  # after which another rank's new file counts as missing
_GIB = 2.0**30


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` is a sentence, empty if nothing is wrong."""

    subject: str
    found: str
    status: Literal["OK", "WARN", "BAD"] = "OK"
    advice: str = ""


@dataclass(frozen=True)
class Facts:
    """Facts about a rank's machine; sizes in GiB."""

    host: str
    versions: dict[str, str]
    unmet: list[str]
    """Requirements of giantdet that the installed packages do not meet."""
    device: str
    gpus: int
    disk: float
    shared_memory: float | None
    open_files: int


def doctor(folder: Path, mebibytes: int, timeout_minutes: float) -> int:
    """Print the report on the main rank; return 1 on all ranks if a line is BAD. All ranks call it."""
    world = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if world != "1" and os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "0":
        print(f"waiting for {world} ranks, at most {timeout_minutes:g} minutes", flush=True)
    try:
        device = comm.start(timeout_minutes)
        gathered = comm.gather_objects(collect(device, folder))
        findings = judge(gathered) if comm.is_main() else []
        findings += [*reach(device, mebibytes), share(folder)]
    except RuntimeError as error:
        if not comm.is_lost_contact(error):
            raise
        print(_line(_unreachable(error)), flush=True)  # by each rank that noticed
        return 1
    bad = comm.broadcast_object(any(finding.status == "BAD" for finding in findings))
    if comm.is_main():
        print("\n".join(map(_line, findings)))
        count = Counter(finding.status for finding in findings)
        print(f"doctor: {count['BAD']} bad, {count['WARN']} to check, {count['OK']} ok", flush=True)
    return int(bad)


def _line(finding: Finding) -> str:
    advice = f"\n      {finding.advice}" if finding.advice else ""
    return f"{finding.status:<5} {finding.subject:<14} {finding.found}{advice}"


def collect(device: torch.device, folder: Path) -> Facts:
    """Return this rank's facts; `folder` is where a run would write."""
    import resource

    versions = {"Python": platform.python_version()} | {name: _version(name) for name in SHOWN}
    versions["CUDA"] = str(torch.version.cuda or "none")
    if device.type == "cuda":
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        gpu = torch.cuda.get_device_properties(device)
        described = f"{gpu.name}, {gpu.total_memory / _GIB:.0f} GiB"
    else:
        described = f"{os.cpu_count()} CPU cores"
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    memory = Path("/dev/shm")
    return Facts(
        host=socket.gethostname(),
        versions=versions,
        unmet=_unmet(),
        device=described,
        gpus=torch.cuda.device_count() if device.type == "cuda" else 0,
        disk=shutil.disk_usage(existing).free / _GIB,
        shared_memory=shutil.disk_usage(memory).free / _GIB if memory.is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _unmet() -> list[str]:
    try:
        texts = metadata.requires("giantdet") or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        texts = []
    requirements = [Requirement(text) for text in texts if "extra ==" not in text]
    found = [(need, _version(need.name)) for need in requirements]
    return [
        f"{need} (here: {version})"
        for need, version in found
        if version == "missing" or not need.specifier.contains(version, prereleases=True)
    ]


def judge(facts: Sequence[Facts]) -> list[Finding]:
    """Return the findings from the facts of all ranks, given in rank order."""
    findings = [_versions(facts), _accelerators(facts)]
    host, disk = min(((fact.host, fact.disk) for fact in facts), key=lambda pair: pair[1])
    advice = "a checkpoint takes 12 to 18 bytes per parameter, times train.keep: free space, or set keep to 1"
    findings.append(_at_least("free disk", disk, LEAST_DISK, f"{disk:.1f} GiB for the output", host, advice))
    memories = [(fact.host, fact.shared_memory) for fact in facts if fact.shared_memory is not None]
    if memories:
        host, memory = min(memories, key=lambda pair: pair[1])
        advice = (
            "loader workers pass batches through /dev/shm: start the container with --shm-size=8g, or set "
        )
        advice += "data.workers to 0"
        found = f"{memory:.1f} GiB in /dev/shm"
        findings.append(_at_least("shared memory", memory, LEAST_SHARED_MEMORY, found, host, advice))
    host, files = min(((fact.host, fact.open_files) for fact in facts), key=lambda pair: pair[1])
    advice = "loader workers and connections need more: run ulimit -n 65536 before the launch"
    findings.append(_at_least("open files", files, LEAST_OPEN_FILES, f"at most {files}", host, advice))
    return findings


def _at_least(subject: str, value: float, least: float, found: str, host: str, advice: str) -> Finding:
    if value >= least:
        return Finding(subject, found)
    status: Literal["WARN", "BAD"] = "BAD" if value < least / 10 else "WARN"
    return Finding(subject, f"{found}, on {host}", status, advice[0].upper() + advice[1:] + ".")


def _versions(facts: Sequence[Facts]) -> Finding:
    """Check that versions are the same on all ranks and meet giantdet's requirements."""
    here = facts[0].versions
    found = ", ".join(f"{name} {version}" for name, version in here.items())
    for name in here:
        if len({fact.versions.get(name) for fact in facts}) > 1:
            by_host = {fact.host: f"{fact.versions.get(name)} on {fact.host}" for fact in facts}
            by_rank = {r: f"{fact.versions.get(name)} on rank {r}" for r, fact in enumerate(facts)}
            differ = ", ".join((by_host if len(by_host) > 1 else by_rank).values())
            return Finding(
                "versions", f"{name} {differ}", "BAD", f"Install one version of {name} everywhere."
            )
    for fact in facts:
        if fact.unmet:
            advice = "Install giantdet's requirements: pip install -e . in its checkout, on every host."
            return Finding("versions", f"on {fact.host} not {', '.join(fact.unmet)}", "BAD", advice)
    return Finding("versions", found + (f"; the same on {len(facts)} ranks" if len(facts) > 1 else ""))


def _accelerators(facts: Sequence[Facts]) -> Finding:
    """Check that there is one process per GPU and that all GPUs are alike."""
    ranks = Counter(fact.host for fact in facts)
    devices = Counter(fact.device for fact in facts)
    hosts = f"{len(facts)} ranks on {len(ranks)} hosts" if len(facts) > 1 else "1 rank"
    found = f"{hosts}: " + ", ".join(f"{count} x {device}" for device, count in devices.items())
    subject = "accelerators"
    if not all(fact.gpus for fact in facts):
        without = next(fact.host for fact in facts if not fact.gpus)
        if any(fact.gpus for fact in facts) or shutil.which("nvidia-smi"):
            advice = f"torch sees no GPU on {without}: check nvidia-smi and CUDA_VISIBLE_DEVICES there, and "
            advice += f"that its driver is new enough for CUDA {facts[0].versions['CUDA']}."
            return Finding(subject, found, "BAD", advice)
        return Finding(subject, found, "WARN", "No GPU: enough for small tests.")
    if len(devices) > 1:
        return Finding(
            subject, found, "WARN", "The slowest GPU limits the speed, the smallest the micro-batch."
        )
    idle = [fact.host for fact in facts if fact.gpus > ranks[fact.host]]
    if idle and len(facts) > 1:
        advice = f"{idle[0]} has more GPUs than ranks: raise slots=N, --nproc_per_node or srun's tasks."
        return Finding(subject, found, "WARN", advice)
    return Finding(subject, found)


def reach(device: torch.device, mebibytes: int) -> list[Finding]:
    """Time barriers and the all-reduce of `mebibytes` over each backend in use. All ranks call it."""
    ranks = comm.world_size()
    if ranks == 1:
        return [Finding("network", "one rank: nothing to check")]
    barrier = _seconds(comm.barrier)
    sums: dict[str, tuple[Callable[[torch.Tensor], Any], torch.device]] = {
        "gloo": (comm.sum_on_cpus_, torch.device("cpu"))
    }
    if device.type == "cuda":
        sums = {"nccl": (comm.sum_over_ranks_, device), **sums}
    findings = []
    for backend, (add, place) in sums.items():
        tensor = torch.empty(mebibytes * 2**18, device=place)

        def reduce(add: Callable[[torch.Tensor], Any] = add, tensor: torch.Tensor = tensor) -> None:
            add(tensor.fill_(1.0))
            float(tensor[-1])  # waits for the GPU

        seconds = _seconds(reduce)
        # Each rank sends and receives this multiple of the tensor in a ring.
        bandwidth = 2 * (ranks - 1) / ranks * tensor.nbytes / seconds / 1e9
        found = f"barrier {barrier * 1e3:.2g} ms, " if backend == "gloo" else ""
        found += f"all-reduce of {mebibytes} MiB in {seconds * 1e3:.3g} ms, {bandwidth:.3g} GB/s per rank"
        if not bool((tensor == ranks).all()):
            advice = "The sum is wrong: memory or network is faulty; leave out hosts until it is right."
            findings.append(Finding(backend, found, "BAD", advice))
        elif bandwidth < LEAST_BANDWIDTH[backend]:
            advice = f"Slow: set {backend.upper()}_SOCKET_IFNAME to the interface of the fast network"
            advice += "; NCCL_DEBUG=INFO shows what NCCL uses." if backend == "nccl" else "."
            findings.append(Finding(backend, found, "WARN", advice))
        else:
            findings.append(Finding(backend, found))
    return findings


def _seconds(action: Callable[[], Any], times: int = 3) -> float:
    """Return the median time of an action of all ranks, after an untimed one that makes the connections."""
    action()
    taken = []
    for _ in range(times):
        comm.barrier()
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[times // 2]


def share(folder: Path) -> Finding:
    """Check that `folder` is the same on all ranks, and how soon they see a new file. All ranks call it."""
    token = f".giantdet-doctor-{uuid4().hex}" if comm.is_main() else ""
    token, problem = comm.broadcast_object((token, _write(folder, token) if comm.is_main() else ""))
    started, seen = time.perf_counter(), False
    while not problem and not seen and time.perf_counter() - started < VISIBLE_SECONDS:
        seen = (folder / token).is_file()
        time.sleep(0 if seen else 0.01)
    answers = comm.gather_objects((socket.gethostname(), seen, time.perf_counter() - started))
    if not comm.is_main():
        return Finding("output", "")
    where = folder.absolute()
    if problem:
        return Finding("output", f"{where}: {problem}", "BAD", "Choose a writable folder with --output.")
    (folder / token).unlink()
    blind = [f"rank {rank} on {host}" for rank, (host, seen, _) in enumerate(answers) if not seen]
    if blind:
        found = f"{where} of rank 0 is not there for {', '.join(blind[:4])}{' ...' if blind[4:] else ''}"
        advice = "Put train.output (and the data) on a file system that all hosts share, under one path."
        return Finding("output", found, "BAD", advice)
    slowest = max(seconds for _, _, seconds in answers)
    shared = f", the same on {len(answers)} ranks; a new file is seen after {slowest * 1e3:.0f} ms"
    return Finding("output", f"{where}{shared if len(answers) > 1 else ' can be written'}")


def _write(folder: Path, token: str) -> str:
    """Make the folder and a file in it; return the error, or an empty string."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).touch()
    except OSError as error:
        return f"{error.strerror}"
    return ""


def _unreachable(error: RuntimeError) -> Finding:
    rank, host = os.environ["RANK"], socket.gethostname()
    main = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    advice = (
        f"Not all ranks reach each other: were all started, does each host reach {main} (name, firewall), "
        "and does GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) name the interface between the hosts on each?"
    )
    return Finding("network", f"rank {rank} on {host}: {comm.reason(error)}", "BAD", advice)
