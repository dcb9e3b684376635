"""The page of a run in a browser, and of runs that have little to show."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import DESKTOP, PHONE, Seen, blank_charts, look
from tiny import tiny_run

from giantdet import cli
from giantdet.config.json_text import json_text
from giantdet.config.load import load_run
from giantdet.config.resolve import describe, resolve
from giantdet.data.dataset import Dataset, open_dataset
from giantdet.engine.environment import record_start
from giantdet.evaluation.coco import CocoEvaluator
from giantdet.evaluation.coco_results import CocoResults
from giantdet.evaluation.rle import Rles
from giantdet.report.build import SECTIONS, report_of_finished, write_report

HOSTILE = '<script>alert("x")</script>'
NAMES = {1: HOSTILE, 2: "R&D \"quoted\" 'name'", 3: "$x^2$ 日本語", 4: "_under"}
ALL = [name for name, *_ in SECTIONS]
OF_MAPS = ["pixels"]
STEPS = 6


def found_in(dataset: Dataset, seed: int = 0) -> list[dict[str, Any]]:
    """Most objects with a shaken box and some with another class, and a few boxes anywhere."""
    rng = np.random.default_rng(seed)
    categories = [number for number, _ in dataset.classes.objects]
    records = []
    for i, image_id in enumerate(dataset.image_ids.tolist()):
        objects = dataset.objects(i)
        for n, (x0, y0, x1, y1) in enumerate(objects.boxes_N4.astype(float).tolist()):
            k = int(objects.labels_N[n]) if rng.random() < 0.8 else int(rng.integers(len(categories)))
            box = [max(0.0, x0 + rng.uniform(-2, 2)), max(0.0, y0 + rng.uniform(-2, 2)), x1 - x0, y1 - y0]
            records.append(
                {
                    "image_id": image_id,
                    "category_id": categories[k],
                    "bbox": box,
                    "score": float(rng.uniform(0.2, 1)),
                    "segmentation": Rles.of([objects.rle(n)]).records()[0],
                }
            )
    return records


def make_run(demo: Path, folder: Path, **changes: Any) -> Path:
    """A finished run of a Mask R-CNN with AGVM, without the training: its folder, which is made."""
    data = folder.parent / "data"
    data.mkdir(exist_ok=True)
    for split in ("train", "val"):
        content = json.loads((demo / f"{split}.json").read_text())
        content["categories"] = [{"id": number, "name": name} for number, name in NAMES.items()]
        (data / f"{split}.json").write_text(json.dumps(content))
        if not (data / split).exists():
            shutil.copytree(demo / split, data / split)
    raw = tiny_run(
        data,
        folder,
        giantdet__train__steps=STEPS,
        giantdet__agvm={"enabled": True, "start_step": 0},
        gradient_accumulation_steps=2,
        **changes,
    )
    recipe = folder.parent / "recipe.json"
    recipe.write_text(json.dumps(raw))
    run = load_run(recipe, ["train.seed=7"])
    train, val = (open_dataset(getattr(run.giantdet.data, split)) for split in ("train", "val"))
    folder.mkdir()
    (folder / "export").mkdir()
    resolved = resolve(run, 1, len(train.training_indices(True)), train.classes, False)
    (folder / "config.json").write_text(describe(replace(resolved, path=None)))
    record_start(resolved, torch.device("cpu"), 0, folder / "environment.json")
    summaries = {"train": train.summary().as_json(), "val": val.summary().as_json()}
    (folder / "data.json").write_text(json_text(summaries))
    records = found_in(val)
    (folder / "results.json").write_text(json_text(records))
    scores = CocoEvaluator.score(val, CocoResults.of(records), masks=True)
    (folder / "scores.json").write_text(json_text(scores))
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        line = {"step": step, "loss": 3 / step if step != 2 else None, "loss_mask": 1 / step, "lr": 0.002}
        line |= {"images_per_second": 10.0, "data_share": 0.1, "memory_gib": 1.0, "grad_norm": 2.0}
        line |= {
            f"agvm/{part}/{value}": 1.0 for part in ("backbone", "top") for value in ("variance", "factor")
        }
        lines += [line | {"skipped_steps": 3}, *([{"step": step, "scores": scores}] if step % 2 == 0 else [])]
    (folder / "metrics.jsonl").write_text("".join(json_text(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def finished(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose folder and classes have names that are HTML, and its page."""
    folder = make_run(demo_data, tmp_path_factory.mktemp("report") / "run <b>&'")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def on_desktop(finished: Path) -> Seen:
    return look(finished / "report.html", DESKTOP, "light")


@pytest.fixture(scope="module")
def on_phone(finished: Path) -> Seen:
    return look(finished / "report.html", PHONE, "dark")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are not drawn: most of the time of a page."""
    blank_charts(monkeypatch)


@pytest.mark.parametrize("which", ["on_desktop", "on_phone"])
def test_the_page_in_a_browser(finished: Path, which: str, request: pytest.FixtureRequest) -> None:
    seen: Seen = request.getfixturevalue(which)
    assert seen.complaints == []
    assert seen.requests == [(finished / "report.html").absolute().as_uri()[:200]]
    assert seen.overflowing == []
    assert seen.broken_images == 0
    assert [name for name in seen.sections if name != "left-out"] == [n for n in ALL if n not in OF_MAPS]
    assert seen.links == [f"#{name}" for name in ALL if name not in OF_MAPS]
    assert "the model predicts no semantic maps" in seen.text and "could not be made" not in seen.text


def test_it_follows_the_colour_scheme(on_desktop: Seen, on_phone: Seen) -> None:
    def brightness(seen: Seen) -> int:
        return sum(map(int, seen.background.removeprefix("rgb(").removesuffix(")").split(",")))

    assert brightness(on_desktop) > 600 and brightness(on_phone) < 150


def test_names_stay_text(finished: Path, on_desktop: Seen) -> None:
    assert on_desktop.title.startswith("run <b>&'")
    assert all(name in on_desktop.text for name in NAMES.values())
    assert on_desktop.scripts == 1  # the page's own
    assert "<script>alert" not in (finished / "report.html").read_text()


def test_what_the_summary_says(finished: Path, on_desktop: Seen) -> None:
    scores = json.loads((finished / "scores.json").read_text())
    head = on_desktop.text.split("Losses and learning rate")[0]
    assert f"{scores['mask']['AP']:.3f}" in head and "mask AP" in head
    assert "6 steps" in head and "12" in head and f"giantdet predict '{finished.parent}/run <b>&'" in head
    lines = on_desktop.text.splitlines()
    skipped = next(line for line in lines if line.startswith("steps skipped"))
    assert skipped.split()[-1] == "3"
    assert any(line.split() == ["giantdet.train.seed", "0", "7"] for line in lines)


def test_pictures_are_files_too(finished: Path) -> None:
    names = {path.name for path in (finished / "report").glob("*.png")}
    assert {"losses.png", "lr.png", "scores.png", "classes.png", "confusion.png", "calibration.png"} <= names
    assert {"precision_recall_box.png", "precision_recall_mask.png", "agvm.png", "sizes.png"} <= names
    assert len(list((finished / "report" / "validation").glob("*_annotated.jpg"))) == 5
    assert len(list((finished / "report" / "train").glob("*.jpg"))) == 6


def reasons(page: Path) -> dict[str, str]:
    """Titles of the sections that were left out, and why; without a browser."""
    text = page.read_text()
    start = text.find('id="left-out"')
    items = text[start:].split("<li><b>")[1:] if start >= 0 else []
    return {title: why for title, why in (item.split("</li>")[0].split("</b>: ", 1) for item in items)}


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def test_nothing_found(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    (run / "results.json").write_text("[]")
    why = reasons(write_report(run))
    assert "found nothing" in why["Confusion matrix"]
    assert "Precision and recall" not in why  # its curves are 0
    assert not [text for text in why.values() if "could not be made" in text]


@pytest.mark.usefixtures("quick")
def test_stopped_before_its_first_line(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    for name in ("metrics.jsonl", "scores.json", "results.json", "data.json", "environment.json"):
        (run / name).unlink()
    page = write_report(run)
    why = reasons(page)
    assert "no lines yet" in why["Losses and learning rate"]
    assert "not evaluated" in why["Predictions beside the annotations"]
    assert not [text for text in why.values() if "could not be made" in text]
    assert 'id="batches"' in page.read_text()


@pytest.mark.usefixtures("quick")
def test_no_validation_set_and_data_that_is_gone(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["giantdet"]["data"]["val"] = None
    config["giantdet"]["data"]["train"]["annotations"] = str(tmp_path / "gone.json")
    (run / "config.json").write_text(json.dumps(config))
    why = reasons(write_report(run))
    assert "no data.val" in why["Calibration of the scores"]
    assert "cannot be opened" in why["Training images as the model sees them"]
    assert not [text for text in why.values() if "could not be made" in text]


@pytest.mark.usefixtures("quick")
def test_a_run_that_did_not_record_its_classes(finished: Path, tmp_path: Path) -> None:
    """As those of version 0.1, which have no environment.json and data.json either."""
    run = copied(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    del config["giantdet"]["data"]["classes"]
    (run / "config.json").write_text(json.dumps(config))
    for name in ("environment.json", "data.json"):
        (run / name).unlink()
    assert set(reasons(write_report(run))) == {"Confusion of pixels", "Data", "Versions and machines"}


@pytest.mark.usefixtures("quick")
def test_lvis_has_no_numbers_of_images(finished: Path, tmp_path: Path) -> None:
    """Its annotations are not exhaustive: no confusions, and no best and worst images."""
    run = copied(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    section = config["giantdet"]["data"]["val"]
    content = json.loads(Path(section["annotations"]).read_text())
    for category in content["categories"]:
        category["frequency"] = "f"
    for image in content["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": [1]}
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    section |= {"format": "lvis", "annotations": str(tmp_path / "lvis.json")}
    (run / "config.json").write_text(json.dumps(config))
    why = reasons(write_report(run))
    assert set(why) == {
        "Precision and recall",
        "Confusion matrix",
        "Confusion of pixels",
        "Calibration of the scores",
    }
    assert "LVIS" in why["Confusion matrix"] and "LVIS" in why["Precision and recall"]
    kinds = {path.name.split("_")[1] for path in (run / "report" / "validation").iterdir()}
    assert kinds == {"random"}


@pytest.mark.usefixtures("quick")
def test_a_broken_section_does_not_lose_the_page(finished: Path, tmp_path: Path, caplog: Any) -> None:
    run = copied(finished, tmp_path / "run")
    (run / "results.json").write_text('[{"image_id": 1}]')
    why = reasons(write_report(run))
    assert "could not be made" in why["Confusion matrix"] and "Confusion matrix" in caplog.text
    assert "Losses and learning rate" not in why


def test_a_failed_report_is_one_line(tmp_path: Path, capsys: Any) -> None:
    report_of_finished(tmp_path)
    said = capsys.readouterr().out
    assert said.count("\n") == 2 and "no report" in said and "no config.json" in said


@pytest.mark.usefixtures("quick")
def test_command_predicts_where_there_are_no_results(
    finished: Path, tiny_export: Path, tmp_path: Path, capsys: Any
) -> None:
    run = copied(finished, tmp_path / "run")
    for name in ("results.json", "scores.json"):
        (run / name).unlink()
    assert cli.main(["report", str(run)]) == 0
    said = capsys.readouterr().out
    assert "no export" in said and said.endswith("report.html\n")

    shutil.rmtree(run / "export")
    shutil.copytree(tiny_export, run / "export")
    exported = json.loads((run / "export" / "config.json").read_text())
    exported["categories"] = list(NAMES.items())
    (run / "export" / "config.json").write_text(json.dumps(exported))
    assert cli.main(["report", str(run), "--device", "cpu"]) == 0
    assert "its export predicts data.val" in capsys.readouterr().out
    assert json.loads((run / "results.json").read_text())
    assert "Scores" not in reasons(run / "report.html")


def test_command_refuses_a_folder_that_is_no_run(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no config.json in it" in capsys.readouterr().err
