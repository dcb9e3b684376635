"""What a run prints before its first step."""

from pathlib import Path

from giantdet.engine.announce import resume_line


def test_a_finished_run_says_so() -> None:
    folder = Path("runs/x/checkpoints")
    assert resume_line(3, 4, folder) == "resuming after step 3 from runs/x/checkpoints"
    for step in (4, 5):
        line = resume_line(step, 4, folder)
        assert line.startswith("already finished") and "train.steps" in line
