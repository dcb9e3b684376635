"""A run of every architecture, from training to predictions on files.

One process trains 4 steps, and into another folder 2 steps, at ZeRO-2; a second process resumes the latter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import PHONE, blank_charts, look
from PIL import Image
from pq import quality, read_panoptic
from pycocotools import mask as mask_util
from safetensors.torch import load_file
from tiny import FORMATS, MODELS, free_port, launch_ok, same_run, tiny_run
from torch.utils._pytree import tree_flatten

from giantdet import cli
from giantdet.architectures import build_model
from giantdet.config.load import load_run
from giantdet.data.dataset import open_dataset
from giantdet.data.loader import eval_loader
from giantdet.distributed import comm
from giantdet.engine.found import Found
from giantdet.engine.predict import load_predictor
from giantdet.export import load_detector
from giantdet.report.build import SECTIONS, write_report

WORKER = Path(__file__).with_name("worker_train.py")
STEPS, STOP = 4, 2
THRESHOLD = 0.0
# Where maps are the only output, evaluation and prediction slide windows over larger images.
WINDOWS: dict[str, dict[str, Any]] = {
    kind: {"giantdet__eval__window_stride": 32, "giantdet__data__short_side": 96}
    for kind in MODELS
    if FORMATS[kind] == "semantic_png"
}
PANOPTIC = [kind for kind in MODELS if FORMATS[kind] == "coco_panoptic"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Path:
    """The folder with the runs KIND and KIND_stopped, and their JSON files."""
    folder = tmp_path_factory.mktemp("runs")

    def write(kind: str, name: str, steps: int, **changes: Any) -> Path:
        settings = {"zero_optimization__stage": 2, "giantdet__train__steps": steps, **WINDOWS.get(kind, {})}
        raw = tiny_run(demo_data, folder / f"{kind}{name}", kind, **settings, **changes)
        file = folder / f"{kind}{name}_{steps}.json"
        file.write_text(json.dumps(raw))
        return file

    first = [write(kind, "", STEPS) for kind in MODELS]
    first += [write(kind, "_stopped", STOP, giantdet__data__val=None) for kind in MODELS]
    launch_ok(WORKER, 1, *first)
    launch_ok(WORKER, 1, *[write(kind, "_stopped", STEPS, giantdet__data__val=None) for kind in MODELS])
    return folder


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The environment of a command that starts torch.distributed in this process."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "RANK": "0"}
    for name, value in (group | {"LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    yield
    comm.stop()


@pytest.mark.parametrize("kind", MODELS)
def test_resumed_equals_uninterrupted_bit_for_bit(runs: Path, kind: str) -> None:
    assert (runs / f"{kind}_stopped/again").is_dir(), "the second launch resumed"
    same_run(runs / kind, runs / f"{kind}_stopped")


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_reloaded_model_predicts_the_same(runs: Path, demo_data: Path, kind: str) -> None:
    """The predictions equal those of a model that loads the exported weights with plain torch."""
    detector, config = load_detector(runs / kind / "export")
    again = build_model(config.model, config.size, config.norm).eval()
    again.load_state_dict(load_file(runs / kind / "export/model.safetensors"))
    run = load_run(runs / kind / "config.json")
    assert run.giantdet.data.val is not None
    dataset = open_dataset(run.giantdet.data.val)
    assert config.classes == run.giantdet.model.predicted(dataset.classes)
    batch = next(eval_loader(dataset, run.giantdet.data, 2))
    for mine, other in zip(tree_flatten(detector(batch))[0], tree_flatten(again(batch))[0], strict=True):
        assert (mine is other is None) or torch.equal(mine, other)
    assert not any(name.startswith(("giantdet", "module")) for name in detector.state_dict())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("one_process")
def test_eval_gives_the_scores_of_the_training(runs: Path, tmp_path: Path, kind: str, capsys: Any) -> None:
    """Not only the table: all result files agree, bit for bit."""
    arguments = ["--config", str(runs / f"{kind}_{STEPS}.json"), "--workers", "0"]
    assert (
        cli.main(
            ["eval", str(runs / kind / "export"), *arguments, "--results", str(tmp_path / "results.json")]
        )
        == 0
    )
    printed = capsys.readouterr().out
    scores = json.loads((runs / kind / "scores.json").read_text())
    detector, _ = load_detector(runs / kind / "export")
    assert scores.keys() == set(detector.tasks)
    for numbers in scores.values():
        assert all(f"  {name}" in printed for name in numbers["per_class"])
    mine = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for path, content in mine.items():
        assert (runs / kind / path).read_bytes() == content, path
    endings = {
        "box": "results.json",
        "semantic": "results_semantic.json",
        "panoptic": "results_panoptic.json",
    }
    assert {endings[task] for task in detector.tasks if task in endings} <= {path.name for path in mine}


@pytest.mark.parametrize("kind", MODELS)
def test_report(runs: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each section is there, or is left out for a reason that is not an error."""
    blank_charts(monkeypatch)
    page = write_report(runs / kind)
    text = page.read_text()
    assert "could not be made" not in text
    boxes, maps = FORMATS[kind] != "semantic_png", FORMATS[kind] != "coco"
    absent = {"agvm"} | (set() if maps else {"pixels"})
    absent |= set() if boxes else {"recall", "confusion", "calibration"}
    found = {name for name, *_ in SECTIONS if f'id="{name}"' in text}
    assert found == {name for name, *_ in SECTIONS} - absent
    assert len(list((runs / kind / "report/validation").glob("*_predicted.jpg"))) == 5  # all images
    if kind in PANOPTIC:
        seen = look(page, PHONE)
        assert (seen.complaints, seen.overflowing, seen.broken_images) == ([], [], 0)


def test_report_without_a_validation_set(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blank_charts(monkeypatch)
    text = write_report(runs / "mask_rcnn_stopped").read_text()
    assert "the run has no data.val" in text and "could not be made" not in text
    assert 'id="batches"' in text and 'id="confusion"' not in text


@pytest.mark.parametrize("kind", PANOPTIC)
def test_written_segments_score_as_printed(runs: Path, demo_data: Path, kind: str) -> None:
    scores = json.loads((runs / kind / "scores.json").read_text())["panoptic"]
    expected = quality(demo_data / "panoptic_val.json", runs / kind / "results_panoptic.json")
    assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_export_command_writes_the_same_model(runs: Path, tmp_path: Path, kind: str) -> None:
    assert cli.main(["export", str(runs / kind), "--output", str(tmp_path / "export")]) == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "export" / name).read_bytes() == (runs / kind / "export" / name).read_bytes()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("one_process")
def test_precise_batch_norms(runs: Path, tmp_path: Path, kind: str) -> None:
    """The command changes the running statistics and nothing else."""
    arguments = ["--batches", "2", "--batch-size", "2", "--output", str(tmp_path)]
    assert cli.main(["precise-bn", str(runs / kind), *arguments]) == 0
    mine, before = (load_file(f / "model.safetensors") for f in (tmp_path, runs / kind / "export"))
    changed = {name.rsplit(".", 1)[1] for name in before if not torch.equal(mine[name], before[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("kind", MODELS)
def test_predict_writes_what_the_predictor_returns(
    runs: Path, demo_data: Path, tmp_path: Path, kind: str
) -> None:
    command = ["predict", str(runs / kind / "export"), str(demo_data / "val"), "--output", str(tmp_path)]
    assert cli.main([*command, "--threshold", str(THRESHOLD)]) == 0
    predictor = load_predictor(runs / kind / "export")
    files = sorted((demo_data / "val").iterdir())
    found = [predictor(file, THRESHOLD) for file in files]
    for file in files:
        with Image.open(tmp_path / f"{file.stem}.png") as picture:
            assert min(picture.size) >= 512, "small images are enlarged"
    for task, same in SAME.items():
        if task in predictor.detector.tasks:
            same(tmp_path, files, found)
    written = {path.name for path in tmp_path.iterdir() if path.suffix != ".png"}
    assert written == {name for task in predictor.detector.tasks for name in WRITTEN[task]}


WRITTEN = {
    "box": ["results.json"],
    "mask": [],
    "semantic": ["semantic", "semantic.json"],
    "panoptic": ["panoptic", "panoptic.json"],
}


def same_objects(folder: Path, files: list[Path], found: list[Found]) -> None:
    records = json.loads((folder / "results.json").read_text())
    assert len(records) == sum(len(one.names) for one in found) > 5
    for number, (file, one) in enumerate(zip(files, found, strict=True)):
        own = [record for record in records if record["image_id"] == number]
        assert {record["file_name"] for record in own} <= {str(file)}
        ids = {name: category for category, name in one.classes.objects}
        for d, record in enumerate(own):
            x0, y0, w, h = record["bbox"]
            assert [x0, y0, x0 + w, y0 + h] == pytest.approx(one.boxes_D4[d].tolist(), abs=1e-4)
            assert record["score"] == float(one.scores_D[d]) >= THRESHOLD
            assert record["category_id"] == ids[one.names[d]]
            if one.masks_DHW is not None:
                assert (mask_util.decode(record["segmentation"]) == one.masks_DHW[d].numpy()).all()
            else:
                assert "segmentation" not in record


def same_maps(folder: Path, files: list[Path], found: list[Found]) -> None:
    classes = json.loads((folder / "semantic.json").read_text())
    assert [(entry["id"], entry["name"]) for entry in classes] == list(found[0].classes.semantic)
    assert [entry["number"] for entry in classes] == list(range(len(classes)))
    assert len(list((folder / "semantic").iterdir())) == len(files)
    for file, one in zip(files, found, strict=True):
        assert one.semantic_HW is not None
        assert (np.array(Image.open(folder / f"semantic/{file.stem}.png")) == one.semantic_HW.numpy()).all()


def same_segments(folder: Path, files: list[Path], found: list[Found]) -> None:
    read = read_panoptic(folder / "panoptic.json")
    images = json.loads((folder / "panoptic.json").read_text())["images"]
    assert images == [{"id": n, "file_name": str(file)} for n, file in enumerate(files)]
    categories = {number for number, _ in (*found[0].classes.objects, *found[0].classes.stuff)}
    total = 0
    for number, one in enumerate(found):
        assert one.panoptic is not None
        segments, pixels = read[number]
        assert {n: s["category_id"] for n, s in segments.items()} == {
            s.id: s.category for s in one.panoptic.segments
        }
        assert {s["category_id"] for s in segments.values()} <= categories
        for n in segments:
            assert pixels[n] == set(np.flatnonzero(one.panoptic.ids_HW == n).tolist())
        total += len(segments)
    assert total > 5, "hardly any segment was found: the test is vacuous"


SAME = {"box": same_objects, "semantic": same_maps, "panoptic": same_segments}
