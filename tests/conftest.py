"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

# The op that DeepSpeed compiles at its first start must not meet the lock of a killed run.
os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.environ.get("GIANTDET_TEST_GPU") else "cuda")

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
