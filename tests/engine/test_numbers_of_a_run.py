"""The logged numbers of a run: learning rates, intervals, monitors, valid JSON; lists of images."""

from __future__ import annotations

import csv
import io
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import REPO, environment, launch, logs, run_together, tiny_run
from wandb.proto import wandb_internal_pb2

from giantdet import cli
from giantdet.config.load import parse_run
from giantdet.config.resolve import resolve
from giantdet.data.coco import CocoDataset
from giantdet.engine.announce import schedule_line
from giantdet.engine.metrics import read_metrics
from giantdet.errors import ConfigError

STEPS, BATCH = 4, 2


@pytest.fixture(scope="module")
def run(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with a schedule, an evaluation every 4 images, and all trackers that need no account."""
    folder = tmp_path_factory.mktemp("numbers")
    raw = tiny_run(
        demo_data,
        folder / "out",
        scheduler={"type": "WarmupPolyLR", "params": {"warmup_num_steps": 2, "warmup_min_ratio": 0.5}},
        csv_monitor={"enabled": True, "output_path": str(folder / "csv"), "job_name": "job"},
        tensorboard={"enabled": True},
        wandb={"enabled": True},
        giantdet__train__steps=STEPS,
        giantdet__train__eval_every=f"{2 * BATCH} images",
        giantdet__train__save_every="3 steps",
        giantdet__train__keep=5,
        giantdet__train__keep_best=False,
    )
    (folder / "run.json").write_text(json.dumps(raw))
    command = [sys.executable, str(REPO / "scripts/train.py"), "--deepspeed_config", str(folder / "run.json")]
    # Not forked: W&B makes its folder of media when it is imported, and each fork would remove it at its end.
    (ended,) = run_together([(command, environment(WANDB_MODE="offline"))])
    assert ended.code == 0, logs([ended])
    (folder / "out.txt").write_text(ended.out)
    (folder / "err.txt").write_text(ended.err)
    return folder


def test_the_logged_lr_is_the_lr_of_the_step(run: Path) -> None:
    """The expected values: half the LR in step 1, three quarters in step 2, then (1 - progress) ** 0.9."""
    logged = [line["lr"] for line in read_metrics(run / "out/metrics.jsonl") if "loss" in line]
    # The warmup multiplies the decay, which does not start before the warmup ends.
    assert logged == pytest.approx([0.002 * f for f in (0.5, 0.75, 1.0, 0.5**0.9)])


def test_files_have_the_permissions_of_new_files(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    files = [path for folder in ("export", "checkpoints") for path in (run / "out" / folder).rglob("*.*")]
    assert any(file.suffix == ".safetensors" for file in files)
    assert {str(file): file.stat().st_mode for file in files if file.is_file()} == {
        str(file): expected for file in files if file.is_file()
    }


def test_an_incomplete_warmup_is_reported(
    demo_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = {"warmup_num_steps": 4, "warmup_min_ratio": 0.5}
    for steps, warnings in ((5, []), (3, ["the LR only reaches 0.0015 of 0.002"])):
        raw = tiny_run(demo_data, tmp_path, scheduler={"type": "WarmupPolyLR", "params": dict(params)})
        raw["giantdet"]["train"]["steps"] = steps
        caplog.clear()
        schedule_line(resolve(parse_run(raw), 1, 10))
        assert [text.split(": ")[1] for text in caplog.messages] == warnings


def test_intervals_in_images_and_steps(run: Path) -> None:
    scored = [line["step"] for line in read_metrics(run / "out/metrics.jsonl") if "scores" in line]
    assert scored == [2, 4]
    assert sorted(path.name for path in (run / "out/checkpoints").iterdir()) == ["step_3", "step_4"]


def test_the_csv_monitor_has_losses_and_scores_by_deepspeeds_sample_count(run: Path) -> None:
    def column(name: str) -> list[tuple[int, float]]:
        with (run / "csv/job" / f"{name}.csv").open() as file:
            return [(int(row[0]), float(row[1])) for row in list(csv.reader(file))[1:]]

    deepspeeds = [x for x, _ in column("Train_Samples_lr")]
    assert [x for x, _ in column("giantdet_loss")] == deepspeeds == [BATCH * s for s in range(1, STEPS + 1)]
    scores = json.loads((run / "out/scores.json").read_text())
    assert [x for x, _ in column("giantdet_box_AP")] == [2 * BATCH, 4 * BATCH]
    assert column("giantdet_box_AP50")[-1][1] == pytest.approx(scores["box"]["AP50"])
    assert column("giantdet_mask_AR100")[-1][1] == pytest.approx(scores["mask"]["AR100"])


PICTURES = [
    "giantdet/val/1_000000",
    "giantdet/val/2_000001",
    "giantdet/val/3_000002",
    "giantdet/val/4_000004",
]
EVALUATED = [2 * BATCH, 4 * BATCH]


def test_tensorboard_has_losses_scores_and_pictures_in_the_runs_folder(run: Path) -> None:
    found = EventAccumulator(str(run / "out/tensorboard"), {"images": 0, "scalars": 0}).Reload()
    lines = [line for line in read_metrics(run / "out/metrics.jsonl") if "loss" in line]
    for name in ("loss", "lr", "lr/backbone", "lr/rpn", "images_per_second"):
        events = found.Scalars(f"giantdet/{name}")
        assert [event.step for event in events] == [BATCH * line["step"] for line in lines]
        assert [event.value for event in events] == pytest.approx([line[name] for line in lines], rel=1e-6)
    assert [event.step for event in found.Scalars("giantdet/box/AP")] == EVALUATED
    tags = found.Tags()
    assert "giantdet/box/APl" not in tags["scalars"], "no object is large: COCO's -1 is no AP"
    assert tags["images"] == PICTURES
    (text,) = found.Tensors("giantdet/config/text_summary")
    assert '"warmup_num_steps": 2' in text.tensor_proto.string_val[0].decode()
    for name in PICTURES:
        events = found.Images(name)
        assert [event.step for event in events] == EVALUATED
        assert Image.open(io.BytesIO(events[-1].encoded_image_string)).size == (512, 512)


def test_wandb_offline_has_them_too(run: Path) -> None:
    """W&B drops, with a warning, what has a smaller step than its last row."""
    (file,) = (run / "out/wandb").glob("offline-run-*/run-*.wandb")
    rows, settings = {}, {}
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "config":
            settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows[record.history.step.num] = row
    logged = {
        BATCH * line["step"]: line for line in read_metrics(run / "out/metrics.jsonl") if "loss" in line
    }
    assert rows.keys() == logged.keys()
    for x, row in rows.items():
        assert json.loads(row["giantdet/loss"]) == pytest.approx(logged[x]["loss"], rel=1e-6)
        assert json.loads(row["giantdet/lr"]) == pytest.approx(logged[x]["lr"], rel=1e-6)
        assert "Train/Samples/lr" in row, "DeepSpeed's own"
        assert ("giantdet/box/AP" in row) == (x in EVALUATED)
        for name in PICTURES:
            assert (f"{name}/path" in row) == (x in EVALUATED)
    assert settings["scheduler"]["params"]["warmup_num_steps"] == 2
    assert settings["giantdet"]["train"]["steps"] == STEPS
    picture = file.parent / "files" / json.loads(rows[EVALUATED[-1]][f"{PICTURES[0]}/path"])
    assert Image.open(picture).size == (512, 512)
    assert "Tried to log to step" not in (run / "err.txt").read_text()


def wandb_records(file: Path) -> Iterator[Any]:
    """W&B's file is a log in LevelDB's format: blocks of 32 KiB of chunks (checksum 4, length 2, type 1).

    After a header of 7 bytes; the types are 1: whole, 2: first, 3: middle, 4: last.
    """
    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        room = 32_768 - at % 32_768
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if room < 7 or kind == 0:
            at += room
            continue
        whole, at = whole + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_a_run_says_where_its_files_are(run: Path) -> None:
    out = (run / "out.txt").read_text()
    ending = out[out.rindex("\n\n") :].split("\n")
    for name in ("export", "checkpoints", "scores.json", "losses.png", "tensorboard"):
        assert any(str(run / "out" / name) in line for line in ending), name
    assert f"giantdet predict {run / 'out/export'} IMAGES" in out


def test_a_finished_run_says_so(run: Path, demo_data: Path) -> None:
    (ended,) = launch(REPO / "scripts/train.py", 1, "--config", run / "run.json", "~tensorboard", "~wandb")
    assert ended.code == 0, logs([ended])
    assert "already finished" in ended.out and f"has all {STEPS} steps" in ended.out
    assert "training:" not in ended.err and "done: step 4/4" in ended.err


def test_scores_are_valid_json(run: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for file in ("scores.json", "results.json", "metrics.jsonl"):
        for line in (run / "out" / file).read_text().splitlines() if file.endswith("l") else [None]:
            json.loads(line or (run / "out" / file).read_text(), parse_constant=refuse)


@pytest.mark.parametrize(
    ("given", "steps"),
    [(0, 0), (7, 7), ("1 epoch", 13), ("0.5 epochs", 7), ("90 images", 12), ("0 epochs", 0), ("5 steps", 5)],
)
@pytest.mark.parametrize("key", ["eval_every", "save_every"])
def test_intervals_resolve_to_steps(key: str, given: Any, steps: int) -> None:
    """100 images in batches of 8."""
    raw = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "giantdet": {"train": {"epochs": 2, key: given}},
    }
    resolved = resolve(parse_run(raw), world_size=1, train_images=100)
    assert getattr(resolved.giantdet.train, key) == steps


@pytest.mark.parametrize("given", [-1, "often", "2 hours", 1.5, True])
def test_invalid_intervals(given: Any) -> None:
    raw = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, "train_batch_size": 8}
    with pytest.raises(ConfigError, match=r"giantdet\.train\.eval_every must be a number of steps"):
        parse_run({**raw, "giantdet": {"train": {"epochs": 2, "eval_every": given}}})


@pytest.fixture
def image_list(demo_data: Path, tmp_path: Path) -> Path:
    """A list like COCO's image_info_test-dev2017.json: images and categories, ids that are not positions."""
    content = json.loads((demo_data / "val.json").read_text())
    del content["annotations"]
    for record in content["images"]:
        record["id"] += 580_000
    (tmp_path / "list.json").write_text(json.dumps(content))
    return tmp_path / "list.json"


@pytest.mark.parametrize("annotations", [None, []])
def test_a_list_of_images_gives_results_without_scores(
    image_list: Path, tiny_export: Path, demo_data: Path, capsys: Any, annotations: Any
) -> None:
    content = json.loads(image_list.read_text())
    ids = {record["id"] for record in content["images"]}
    if annotations is not None:
        image_list.write_text(json.dumps(content | {"annotations": annotations}))
    arguments = ["eval", str(tiny_export), "--annotations", str(image_list), "--images"]
    arguments += [str(demo_data / "val"), "--workers", "0"]
    results = image_list.parent / "results.json"
    assert cli.main([*arguments, "--results", str(results)]) == 0
    out = capsys.readouterr().out
    assert "no annotations, so there are no scores" in out and "AP" not in out
    assert {result["image_id"] for result in json.loads(results.read_text())} <= ids
    assert len(json.loads(results.read_text())) > 5
    assert cli.main(arguments) == 2, "without --results there would be no output"
    assert "give --results FILE" in capsys.readouterr().err


def test_a_list_of_images_cannot_be_trained_on(image_list: Path, demo_data: Path) -> None:
    dataset = CocoDataset(image_list, demo_data / "val")
    assert len(dataset) == 5 and not dataset.annotated
    for filtered in (True, False):
        with pytest.raises(ValueError, match="a list of images can be evaluated, but not trained on"):
            dataset.training_indices(filtered)
