"""The examples of the documentation run unchanged."""

from __future__ import annotations

import re

from tiny import REPO, launch_ok


def test_agvm_in_a_foreign_loop() -> None:
    example = REPO / "docs/agvm_example.py"
    assert len(example.read_text().splitlines()) <= 60
    lines = [line for line in launch_ok(example, 2)[0].out.splitlines() if line.startswith("step ")]
    losses = [float(line.split()[3]) for line in lines]
    assert losses[-1] < 0.3 * losses[0]
    factors = [re.search(r"agvm/decoder/factor': '([\d.]+)'", line) for line in lines]
    assert factors[0] and factors[-1] and factors[0][1] == "1.000" != factors[-1][1]
