"""Golden inputs and detectron2's outputs of the detection operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def golden(shared: Path) -> dict[str, Tensor]:
    """Inputs under their own names, detectron2's outputs as `d2.NAME`."""
    inputs = np.load(shared / "golden" / "ops_inputs.npz")
    outputs = np.load(shared / "golden" / "ops_detectron2.npz")
    arrays = {name: inputs[name] for name in inputs} | {f"d2.{name}": outputs[name] for name in outputs}
    return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


@pytest.fixture
def random_boxes():
    """A function that draws random valid boxes: `random_boxes(shape, low, high, seed)` -> `[*shape, 4]`."""

    def make(*shape: int, extent: float = 200.0, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        corner = torch.rand(*shape, 2, generator=generator) * extent
        size = torch.rand(*shape, 2, generator=generator) * extent * 0.4 + 1
        return torch.cat([corner, corner + size], dim=-1)

    return make
