"""What a run prints before its first step."""

from pathlib import Path

from giantdet.engine.announce import resumed


def test_a_finished_run_says_so() -> None:
    folder = Path("runs/x/checkpoints")
    assert resumed(3, 4, folder) == "resuming after step 3 from runs/x/checkpoints"
    for step in (4, 5):
        assert resumed(step, 4, folder).startswith("already finished") and "train.steps" in resumed(
            step, 4, folder
        )
