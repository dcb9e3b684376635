"""Runs into folders of other runs, and data sets whose ids mean other names: real runs on two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import launch_ok, tiny_run

from giantdet import cli
from giantdet.engine.lock import LOCK
from giantdet.export import read_export_config

WORKER = Path(__file__).with_name("worker_identity.py")
PERMUTED = {1: 4, 3: 1, 4: 7, 7: 3}  # the same names under other ids


def renamed(source: Path, target: Path, names: dict[str, str], ids: dict[int, int]) -> None:
    content: dict[str, Any] = json.loads(source.read_text())
    for category in content["categories"]:
        category["name"] = names.get(category["name"], category["name"])
        category["id"] = ids.get(category["id"], category["id"])
    for annotation in content["annotations"]:
        annotation["category_id"] = ids.get(annotation["category_id"], annotation["category_id"])
    target.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> tuple[Path, dict[str, str], str]:
    """The folder of all runs, the output of each, and the config.json of the first after its own training."""
    folder = tmp_path_factory.mktemp("identity")
    data = folder / "data"
    shutil.copytree(demo_data, data)
    for split in ("train", "val"):
        renamed(data / f"{split}.json", data / f"{split}_other.json", {"star": "comet"}, {})
    renamed(data / "val.json", data / "val_permuted.json", {}, PERMUTED)
    other = {
        "giantdet__data__train__annotations": str(data / "train_other.json"),
        "giantdet__data__val__annotations": str(data / "val_other.json"),
    }
    permuted = {"giantdet__data__val__annotations": str(data / "val_permuted.json")}
    unknown = {"giantdet__data__val__annotations": str(data / "val_other.json")}
    canvas = {"giantdet__data__size": [96, 96], "giantdet__train__steps": 3}
    init = {"giantdet__model__init_weights": str(folder / "a/export")}
    plans: dict[str, tuple[str, dict[str, Any]]] = {
        "first": ("a", {}),
        "other classes": ("a", other),
        "other model": ("a", {"giantdet__model__conventions": "torchvision"}),
        "permuted": ("b", permuted),
        "names missing": ("c", unknown),
        "fine-tuned": ("d", {**other, **init}),
        "other canvas": ("d", {**other, **canvas}),
    }
    files = {}
    for number, (name, (output, changes)) in enumerate(plans.items()):
        files[name] = folder / f"{number}.json"
        files[name].write_text(json.dumps(tiny_run(data, folder / output, **changes)))
    (ended, *_) = launch_ok(WORKER, 2, *files.values())
    lines = {line.split()[1]: line for line in ended.out.splitlines() if line.startswith(("TRA", "REF"))}
    return folder, {name: lines[str(path)] for name, path in files.items()}, ended.err


def test_a_run_with_other_classes_is_refused(runs: tuple[Path, dict[str, str], str]) -> None:
    folder, printed, _ = runs
    assert printed["first"].startswith("TRAINED")
    line = printed["other classes"]
    assert "class 3 was 'star' (id 7) and is 'comet' (id 7) now" in line and "train.output" in line
    assert "conventions detectron2, and this run has torchvision" in printed["other model"]
    names = [name for _, name in read_export_config(folder / "a/export").categories]
    assert names == ["circle", "rectangle", "triangle", "star"]
    kept = json.loads((folder / "a/config.json").read_text())["giantdet"]
    assert kept["data"]["classes"]["objects"][3] == [7, "star"]
    assert kept["model"]["conventions"] == "detectron2"
    assert not (folder / "a" / LOCK).exists()


def test_another_canvas_is_reported(runs: tuple[Path, dict[str, str], str]) -> None:
    _, printed, err = runs
    assert printed["other canvas"].startswith("TRAINED")
    assert "giantdet.data.size was [64, 64] and is [96, 96] now" in err


def test_validation_classes_are_matched_by_name(runs: tuple[Path, dict[str, str], str]) -> None:
    """The same images with permuted ids get the same scores, and results with their own ids."""
    folder, printed, err = runs
    assert printed["permuted"].split()[-1] == printed["first"].split()[-1]
    assert "are matched by name: circle 4 for 1" in err
    results = [json.loads((folder / run / "results.json").read_text()) for run in "ab"]
    assert [PERMUTED[r["category_id"]] for r in results[0]] == [r["category_id"] for r in results[1]]
    assert "'comet' (id 7) is not among the classes" in printed["names missing"]


def test_class_layers_are_transferred_by_name(runs: tuple[Path, dict[str, str], str]) -> None:
    _, printed, err = runs
    assert printed["fine-tuned"].startswith("TRAINED")
    assert "taken over: circle, rectangle, triangle; new weights for: comet" in err


def test_export_needs_no_annotations(runs: tuple[Path, dict[str, str], str], tmp_path: Path) -> None:
    folder, _, _ = runs
    shutil.copytree(folder / "a", tmp_path / "a")
    shutil.move(folder / "data", folder / "elsewhere")
    assert cli.main(["export", str(tmp_path / "a"), "--output", str(tmp_path / "e")]) == 0
    assert read_export_config(tmp_path / "e").categories[3] == (7, "star")
    assert (tmp_path / "e/model.safetensors").stat().st_size > 1000
