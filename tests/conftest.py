"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.environ.get("GIANTDET_TEST_GPU") else "cuda")

import pytest

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"
RANKS = "distributed"  # the folder of tests that launch several ranks
# DeepSpeed's compiled ops must not wait for a lock left by a killed run elsewhere.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(REPO / "runs/torch_extensions"))
# Bytecode goes to a separate folder: an environment that forbids it, as containers often do, makes every
# process compile torch, timm and DeepSpeed again, which takes twice as long as everything else.
sys.dont_write_bytecode, sys.pycache_prefix = False, str(REPO / "runs/bytecode")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
# Always this environment's ninja: another version hashes commands differently and recompiles everything.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data beside the checkout: golden outputs, real images, real weights."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"needs the reference data of the developers in {SHARED.name}/ beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo set, 12 training and 5 validation images of 64 pixels."""
    from giantdet.data.demo import make_demo

    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder, train_images=12, val_images=5, size=64)
    return folder


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of an untrained tiny detector of the demo set's classes, written without an engine."""
    import torch
    from safetensors.torch import save_file
    from tiny import MODEL

    from giantdet.architectures import build_model
    from giantdet.config.architectures.common import NormConfig
    from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
    from giantdet.data.demo import CATEGORIES
    from giantdet.export import ExportConfig

    folder = tmp_path_factory.mktemp("export")
    config = ExportConfig(
        model=MaskRcnnConfig.model_validate({**MODEL, "num_classes": 4}),
        norm=NormConfig(type="local"),
        size=(64, 64),
        short_side=64,
        categories=tuple(CATEGORIES.items()),
    )
    torch.manual_seed(0)
    save_file(build_model(config.model, config.size, config.norm).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(config.model_dump_json())
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, which keeps the tests of a file together, launch ranks one launch at a time.

    Ranks that share cores with other ranks wait for one another more than they compute: two concurrent
    launches take longer than two consecutive ones.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return RANKS if f"/{RANKS}/" in nodeid else super()._split_scope(nodeid)

    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that launch ranks first, since they take longest."""
    items.sort(key=lambda item: item.path.parent.name != RANKS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Encode a test's output so that one test process can send it to another."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report
