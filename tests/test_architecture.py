"""Rules for the code as tests: who imports whom, where collectives are, what a step must not do, sizes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "giantdet"
FILES = sorted(PACKAGE.rglob("*.py"))
# Imports point to the same or an earlier entry.
ORDER = [
    "errors",
    "config",
    "structures",
    "ops",
    "data",
    "distributed",
    "layers",
    "architectures",
    "evaluation",
    "optim",
    "checkpoint",
    "export",
    "engine",
    "tools",
    "report",
    "cli",
]
SAME = {
    "commands": "cli",
    **dict.fromkeys(("export_folder", "graph", "import_weights"), "export"),
}
MAX_LINES = 360

# Each of these makes the host wait for the device, or makes a shape depend on data.
BANNED = {
    "item",
    "tolist",
    "nonzero",
    "cpu",
    "numpy",
    "masked_select",
    "unique",
    "unique_consecutive",
    "argwhere",
}
# Not part of a step: weights are loaded once, before training.
# shapes.py skips empty slots, but only on the CPU.
NOT_IN_A_STEP = {"layers/weights.py", "ops/shapes.py"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def trees(*parts: str) -> Iterator[tuple[str, ast.Module]]:
    for path in FILES:
        if not parts or name_of(path).startswith(parts):
            yield name_of(path), ast.parse(path.read_text())


def imports(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Return line and full dotted name of every import in a file, also inside functions."""
    package = ["giantdet", *name.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def rank(part: str) -> int:
    return ORDER.index(SAME.get(part, part))


def test_imports_point_to_earlier_parts() -> None:
    wrong, seen = [], 0
    for name, tree in trees():
        here = name.split("/")[0].removesuffix(".py")
        if here == "__init__":
            continue
        for line, module in imports(name, tree):
            parts = module.split(".")
            if parts[0] != "giantdet" or parts[1] == "__version__":
                continue
            seen += 1
            if rank(parts[1]) > rank(here):
                wrong.append(f"{name}:{line} imports {module}")
    assert seen > 50
    assert not wrong, "\n".join(wrong)


def test_collectives_are_in_one_file() -> None:
    wrong = []
    for name, tree in trees():
        if name == "distributed/comm.py":
            continue
        for line, module in imports(name, tree):
            if module.startswith(("torch.distributed", "deepspeed.comm")):
                wrong.append(f"{name}:{line} imports {module}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(
                ("torch.distributed", "deepspeed.comm")
            ):
                wrong.append(f"{name}:{node.lineno} uses {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_deepspeed_settings_are_read_through_types() -> None:
    """Outside config/ there are no look-ups by key, whose defaults would repeat those of the sections."""
    wrong = [
        f"{name}:{node.lineno} {ast.unparse(node)}"
        for name, tree in trees()
        if not name.startswith("config/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "deepspeed"
    ]
    assert not wrong, "\n".join(wrong)


# Names of parts, which belong only in the architectures, the layers and their sections of the JSON.
PARTS = re.compile(r"\b(rpn|box_head|mask_head|semantic_head|fpn)\b")
KNOW_PARTS = ("architectures/", "layers/", "config/architectures/")


def test_parts_of_models_are_named_only_in_architectures() -> None:
    wrong = [
        f"{name_of(path)}:{number} {line.strip()}"
        for path in FILES
        if not name_of(path).startswith(KNOW_PARTS)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PARTS.search(line)
    ]
    assert not wrong, "\n".join(wrong)
    assert PARTS.search((PACKAGE / "architectures/mask_rcnn.py").read_text())


# Imports inside functions keep `giantdet --help` fast; elsewhere they hide a file's dependencies.
LATE = {"cli.py", "__init__.py"}
HEAVY = ("deepspeed", "timm", "torch", "matplotlib", "resource", "supervision", "onnx", "wandb")


def test_no_imports_inside_functions() -> None:
    wrong = []
    for name, tree in trees():
        if name in LATE or name.startswith(("tools/", "commands/")):
            continue
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for line, module in imports(name, ast.Module(body=function.body, type_ignores=[])):
                    if not module.startswith(HEAVY):
                        wrong.append(f"{name}:{line} imports {module} in {function.name}")
    assert not wrong, "\n".join(wrong)


def host_syncs(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in BANNED:
            yield node.lineno, ast.unparse(node)
        # where with only a condition is nonzero under another name
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.where" and len(node.args) == 1:
            yield node.lineno, ast.unparse(node)
        # x[y > 0] has as many values as are True
        if isinstance(node, ast.Subscript) and isinstance(node.slice, (ast.Compare, ast.UnaryOp)):
            is_number = isinstance(node.slice, ast.UnaryOp) and not isinstance(node.slice.op, ast.Invert)
            if not is_number:
                yield node.lineno, ast.unparse(node)


def test_a_step_never_synchronises_with_the_device() -> None:
    """Checks the source code; `tests/architectures/test_trace.py` records the operators that really run."""
    wrong = [
        f"{name}:{line} {text}"
        for name, tree in trees("ops/", "layers/", "architectures/")
        if name not in NOT_IN_A_STEP
        for line, text in host_syncs(tree)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code", ["x.item()", "torch.where(x)", "x[x > 0]", "x[~y]", "x.nonzero()", "x.cpu()"]
)
def test_the_search_detects(code: str) -> None:
    assert list(host_syncs(ast.parse(code)))
    assert not list(host_syncs(ast.parse("x[-1], x[:, None], torch.where(x, y, z), x[i]")))


def test_sizes() -> None:
    lines = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}
