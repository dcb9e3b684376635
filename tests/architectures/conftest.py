"""Fixtures of the models' tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """What detectron2's own models answer; its README says how they are made."""
    return shared / "golden/models"
