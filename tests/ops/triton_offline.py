"""Triton kernels without a GPU: run by Triton's interpreter, or compiled for a GPU but not run.

Both change the process, so tests run them in a subprocess.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ARCHITECTURES = (80, 90)  # A100; H100 and H200


def run_script(*command: str | Path, interpret: bool = False) -> str:
    """Return the output of a Python script, run with Triton's interpreter or without."""
    if interpret and _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 does not work with NumPy 2.4")
    env = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    result = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _version(package: str) -> tuple[int, ...]:
    return tuple(map(int, metadata.version(package).split(".")[:2]))


def only_compile(arch: int) -> list[Any]:
    """Make launches only compile for `arch`; return the list that collects the kernels."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return arch

        def get_current_stream(self, device: int) -> int:
            return 0

    kernels: list[Any] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(Driver())
    JITFunction.run = run
    return kernels


def describe(kernel: Any) -> dict[str, Any]:
    """Return a kernel's name and its resources, as reported by the assembler."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", report.stdout).groups()
    return {
        "name": kernel.metadata.name,
        "arch": kernel.metadata.target.arch,
        "registers": int(registers),
        "spilled": int(stack) + int(local),
        "wide_loads": len(re.findall(r"ld\.global\.v4", kernel.asm["ptx"])),
        "wide_additions": len(re.findall(r"add\.v4\.f32", kernel.asm["ptx"])),
    }
