"""The only file that uses torch.distributed: starting, ranks and groups, small messages between ranks.

Objects and flags are sent over a gloo group on the CPU, so that they never queue behind GPU work and waiting
for a late rank ends in a time-out, not in a hang. In a single process that was never started, every function
returns at once.
"""

from __future__ import annotations

import gc
import os
import re
import socket
import time
from datetime import timedelta
from functools import cache, lru_cache
from typing import Any

import torch
import torch.distributed as dist

from giantdet.errors import InputError

Group = dist.ProcessGroup

_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "remote process exited or there was a network error",  # ncclRemoteError
    "Watchdog caught collective operation timeout",
)


def start(timeout_minutes: float = 30.0) -> torch.device:
    """Join the process group of the launcher (deepspeed, torchrun, srun or none); return this rank's device.

    NCCL on GPUs, gloo on CPUs. A rank waits at most `timeout_minutes` for
    the others, here and in every collective of every group, DeepSpeed's too (`is_lost_contact`).
    """
    timeout = timedelta(minutes=timeout_minutes)
    # Groups that are made later, ours and DeepSpeed's, use these time-outs, not that of the first group.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    has_gpu = torch.cuda.is_available()
    # DeepSpeed chooses its accelerator at import; without a GPU it must not search for one.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_gpu else "cpu")
    _fill_environment()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise InputError(
                f"local rank {local_rank}, but the process sees {gpus} GPUs: start one process per GPU, and "
                "let each see all GPUs of its machine (srun: --gpus-per-node and no --gpus-per-task)"
            )
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        import deepspeed  # late: the import takes seconds and reads DS_ACCELERATOR

        # Used for inference only: compiling it takes a minute, and each rank leaves 66 MiB in /dev/shm.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        try:
            deepspeed.init_distributed(
                dist_backend="nccl" if has_gpu else "gloo",
                auto_mpi_discovery=False,
                verbose=False,
                timeout=timeout,
            )
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            port = os.environ["MASTER_PORT"]
            raise InputError(
                f"port {port} of this host is in use: give the launcher another --master_port"
            ) from None
    return device


def is_lost_contact(error: BaseException) -> bool:
    """Return whether an error of a collective or of the start means that another rank is gone or late.

    gloo and NCCL raise plain RuntimeErrors, so their text decides. If NCCL's watchdog notices the time-out
    first, it ends the process itself (SIGABRT), with its own message.
    """
    text = str(error)
    return isinstance(error, dist.DistNetworkError | dist.DistStoreError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _LOST)
    )


def reason(error: BaseException) -> str:
    """Return the message of a collective's error without its source line and stack."""
    source, advice = r"^\[.*?\] ", r"\.?( This is typically.*)?(\n.*)?$"
    return re.sub(f"{source}|{advice}", "", str(error), flags=re.DOTALL)


def describe_lost_contact(error: BaseException) -> str:
    """Return one line about an error that `is_lost_contact`: the rank, the reason, and what to do."""
    who = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}"
    return (
        f"{who} lost contact with another rank ({reason(error)}): its process or host has stopped, the "
        "network has failed, or it is later than train.timeout_minutes; see its last output. Start the run "
        "again: it resumes from its newest checkpoint"
    )


def _fill_environment() -> None:
    """Set the variables that deepspeed and torchrun set, in a process of srun or plain python.

    Raises ValueError if the ranks cannot find each other.
    """
    environment = os.environ
    if "RANK" not in environment and _is_srun():
        environment.update(
            RANK=environment["SLURM_PROCID"],
            WORLD_SIZE=environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")),
            LOCAL_RANK=environment["SLURM_LOCALID"],
        )
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = _first_host(environment.get("SLURM_STEP_NODELIST", ""))
        if "SLURM_JOB_ID" in environment:  # the same port on all ranks of the job
            port = 20_000 + int(environment["SLURM_JOB_ID"]) % 10_000
            environment.setdefault("MASTER_PORT", str(port))
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        environment.setdefault(name, value)
    if "MASTER_PORT" not in environment:
        if environment["WORLD_SIZE"] != "1":
            raise InputError(
                "MASTER_PORT is not set: export a port that is free on rank 0's host, for example 29500"
            )
        environment["MASTER_PORT"] = str(_free_port())


def _is_srun() -> bool:
    """Return whether srun started this process. A batch script also has SLURM_PROCID, but is alone."""
    return "SLURM_PROCID" in os.environ and bool({"SLURM_STEP_NUM_TASKS", "MASTER_ADDR"} & os.environ.keys())


def _first_host(nodes: str) -> str:
    """Return the first of a Slurm list of hosts: of node[003-010,12]-ib,login it is node003-ib."""
    host = re.sub(r"\[([^],-]+)[^]]*]", r"\1", nodes).split(",")[0]
    if not host:
        raise InputError(
            "neither MASTER_ADDR nor SLURM_STEP_NODELIST is set: export rank 0's host as MASTER_ADDR"
        )
    return host


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop() -> None:
    """Leave the process group and end its threads.

    A thread of gloo that outlives the interpreter can abort the process at its exit. DeepSpeed keeps a group
    of its own, which torch's `destroy_process_group` does not release, and engines are in cycles with theirs.
    At ZeRO-3 caches of DeepSpeed 0.19 keep the model, its groups and their threads all the same.
    """
    if dist.is_initialized():
        import deepspeed

        _cpu_group.cache_clear()
        subgroup.cache_clear()
        deepspeed.comm.destroy_process_group()
        gc.collect()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return True on the rank that writes files and prints."""
    return rank() == 0


@lru_cache(maxsize=1)
def _cpu_group() -> Any:
    return dist.new_group(backend="gloo")


def barrier() -> None:
    if world_size() > 1:
        dist.barrier(group=_cpu_group())


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's value, in rank order, on the main rank; an empty list on the others."""
    if world_size() == 1:
        return [value]
    found: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, found, dst=0, group=_cpu_group())
    return found or []


def broadcast_object(value: Any) -> Any:
    """Return the main rank's value on all ranks."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_cpu_group())
    return box[0]


def mean_over_ranks(values: list[float]) -> list[float]:
    """Return the elementwise mean of a short list of numbers; all ranks must call it."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=_cpu_group())
    return (total / world_size()).tolist()


@cache
def subgroup(ranks: int) -> Group | None:
    """Return this rank's group of `ranks` consecutive ranks; None (no communication) if it would be alone.

    All ranks must call it, in the same order; `ranks` divides the world. The group has its own communicator
    even if it spans the world: small messages in a step must not queue behind the reduction of gradients.
    """
    return dist.new_subgroups(group_size=ranks)[0] if ranks > 1 else None


def group_size(group: Group | None) -> int:
    """Return the number of ranks of a process group, 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def all_gather(tensor: torch.Tensor, group: Group | None) -> torch.Tensor:
    """Return the tensor of each rank of the group, in rank order: `[ranks, *tensor.shape]`."""
    if group is None:
        return tensor[None]
    gathered = tensor.new_empty(dist.get_world_size(group) * tensor.numel())
    dist.all_gather_into_tensor(gathered, tensor.flatten(), group=group)
    return gathered.view(-1, *tensor.shape)


def all_reduce(tensor: torch.Tensor, group: Group | None) -> torch.Tensor:
    """Sum `tensor` over the ranks of the group, in place, and return it."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def sum_over_ranks_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place, and return it; all ranks must call it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_on_cpus_(tensor: torch.Tensor) -> torch.Tensor:
    """`sum_over_ranks_` of a CPU tensor over gloo, for any backend of the GPUs."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=_cpu_group())
    return tensor


def said_by_main(message: str, seconds: float = 3.0) -> bool:
    """Return whether the main rank stops with the same `message` as this rank, and prints it.

    False on the main rank, which prints it, and if the main rank has another message or none in time. Uses
    the store of the process group, not a collective: the other ranks may be anywhere in the program.
    """
    words, heard = "giantdet/last_words", "giantdet/last_words_heard"
    try:
        store = dist.distributed_c10d._get_default_store()
        if is_main():
            store.set(words, message)
            end = time.monotonic() + seconds
            # The store may be in this process, so stay until all ranks have asked.
            while store.add(heard, 0) < world_size() - 1 and time.monotonic() < end:
                time.sleep(0.05)
            return False
        store.set_timeout(timedelta(seconds=seconds))
        same = store.get(words).decode() == message
        store.add(heard, 1)
        return same
    except (dist.DistStoreError, RuntimeError):
        return False


def average_(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, in place; all ranks must call it.

    Summed in float64, so that tensors that are equal on all ranks do not change in any bit.
    """
    if world_size() == 1 or not tensors:
        return
    total = sum_over_ranks_(torch.cat([tensor.detach().double().flatten() for tensor in tensors]))
    parts = torch.split(total / world_size(), [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def any_rank(flag: bool) -> bool:
    """Return True on all ranks if `flag` is True on any; all ranks must call it."""
    return max(mean_over_ranks([float(flag)])) > 0.0
