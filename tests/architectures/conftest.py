"""Fixtures of the models' tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """The folder of detectron2's golden outputs; its README says how they were made."""
    return shared / "golden/models"
