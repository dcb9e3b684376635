"""Every kind of bad input gives its own line and exit code, or is skipped and counted: a test per table row.

`python tests/test_bad_input.py` writes docs/bad-input.md from the table.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs import TABLE
from bad_inputs.annotations import ANNOTATIONS, good_content
from bad_inputs.cases import Case, Error, Noted, Replaced, Skipped, Works
from bad_inputs.commands import COMMANDS
from bad_inputs.configurations import CONFIGURATIONS
from bad_inputs.images import IMAGES, SIZE, encoded
from bad_inputs.maps import MAPS
from bad_inputs.weights import EXPORTS, WEIGHTS
from tiny import MODEL, REPO, free_port, launch, logs, set_path, tiny_run

from giantdet import cli
from giantdet.config.load import load_run
from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.dataset import open_dataset
from giantdet.data.demo import CATEGORIES, make_demo
from giantdet.data.images import limit_pixels
from giantdet.data.loader import eval_loader, train_loader
from giantdet.data.streams import TrainStream, sample_index
from giantdet.data.truth import NEUTRAL, ground_truth
from giantdet.data.validate import validate
from giantdet.engine.metrics import read_metrics
from giantdet.engine.train import seed_step
from giantdet.evaluation.coco import evaluate_results

DOCUMENT = REPO / "docs/bad-input.md"
DATA = DataConfig(size=(64, 64), short_side=64, max_objects=5, mask_frame=28, workers=0)


def each(cases: list[Case]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("case", cases, ids=[case.what.replace(" ", "_") for case in cases])


def matches(line: str, text: str) -> bool:
    """Return whether `text` contains this line of the table, in which `...` stands for anything."""
    return re.search(".*".join(map(re.escape, line.split("..."))), text, re.DOTALL) is not None


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "RANK": "0"}
    for name, value in (group | {"LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands without --output write to the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A valid data set of three images, with its annotations in train.json."""
    (tmp_path / "data/images").mkdir(parents=True)
    for name in "abc":
        (tmp_path / f"data/images/{name}.png").write_bytes(encoded("PNG"))
    (tmp_path / "data/train.json").write_text(json.dumps(good_content()))
    return tmp_path / "data"


def run_of(data: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Return a run on the data set, with values changed by dotted path."""
    both = {"annotations": str(data / "train.json"), "images": str(data / "images")}
    raw = tiny_run(data, data / "out", giantdet__data__train=both, giantdet__data__val=both)
    for path, value in changes.items():
        set_path(raw, path, value)
    return raw


def ends_with(outcome: Error, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Assert exit code 2, and one message with this line."""
    code = cli.main(arguments)
    err = capsys.readouterr().err
    assert code == 2, err
    assert "Traceback" not in err
    messages = err.split("giantdet: error: ")[1:]
    assert len(messages) == 1, err
    assert matches(outcome.line, messages[0].splitlines()[0]), messages[0]


@each(CONFIGURATIONS)
def test_configuration(case: Case, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, overrides = data / "run.json", case.make if isinstance(case.make, list) else []
    if isinstance(case.make, bytes):
        file.write_bytes(case.make)
    else:
        file.write_text(json.dumps(run_of(data, case.make if isinstance(case.make, dict) else {})))
    arguments = ["train", "--config", str(file), *overrides]
    if isinstance(case.outcome, Error):
        ends_with(case.outcome, arguments, capsys)
        assert not (data / "out/checkpoints").exists()
    else:
        assert cli.main([*arguments, "--print-config"]) == 0


def perfect(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return results that match the objects of valid content."""
    keys = ("image_id", "category_id", "bbox")
    return [{key: record[key] for key in keys} | {"score": 0.9} for record in content["annotations"]]


def seen(dataset: CocoDataset, workers: int = 0) -> tuple[list[int], dict[str, int]]:
    """Return the image ids of 12 training samples, and the counts of the loader."""
    loader = train_loader(dataset, DATA.model_copy(update={"workers": workers}), 4, seed=1)
    ids = [int(i) for _ in range(3) for i in next(loader).image_ids_B]
    loader.close()
    return ids, {kind: count for kind, count in loader.counters.items() if count}


def replacements(dataset: CocoDataset, bad: int) -> int:
    """Return how many draws of the bad image the 12 samples take, counted by hand."""
    stream, count = TrainStream(dataset, DATA, 1), 0
    for k in range(12):
        while dataset.image_ids[stream.indices[sample_index(k, len(stream), 1)]] == bad:
            k, count = k + 1, count + 1
    return count


@each(ANNOTATIONS)
def test_annotations(case: Case, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, content = data / "train.json", good_content()
    if isinstance(case.make, bytes):
        file.write_bytes(case.make)
    else:
        case.make(content)
        file.write_text(json.dumps(content))
    if isinstance(case.outcome, Error):
        with pytest.raises(ValueError) as raised:
            seen(CocoDataset(file, data / "images"))
        assert matches(case.outcome.line, str(raised.value)) and "\n" not in str(raised.value)
        return
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        dataset = CocoDataset(file, data / "images")
        ids, counts = seen(dataset)
        scores = evaluate_results(file, perfect(good_content()), masks=False)["box"]
    problems = [problem.kind for problem in validate(file, data / "images") if problem.is_error]
    if isinstance(case.outcome, Skipped):
        kind, records = case.outcome
        assert dict(dataset.skipped) == {kind: records}
        assert f"skipped {records} ({kind})" in caplog.text
        assert problems.count(kind) == records
        assert set(ids) == {1, 2, 3} and not counts
    elif isinstance(case.outcome, Noted):
        kind, _, records = case.outcome
        assert dict(dataset.noted) == {kind: records} and not dataset.skipped and not problems
        assert f"used {records}, not as written ({kind})" in caplog.text
        warned = [problem.kind for problem in validate(file, data / "images") if problem.level == "warning"]
        assert warned.count(kind) == records and {1, 2, 3} <= set(ids) and not counts
    else:
        assert not dataset.skipped and not dataset.noted and not problems and {1, 2, 3} <= set(ids)
        assert set(counts) <= {"dropped_objects"}
    anns = ground_truth(file).anns.values()
    more = sum(not annotation["iscrowd"] and NEUTRAL not in annotation for annotation in anns) - 3
    assert more == len(dataset.labels_K) - 3, "both readers keep the same objects"
    assert more == 0 or isinstance(case.outcome, Works | Noted)
    assert scores["AP"] == pytest.approx(1.0) if more == 0 else 0 <= scores["AP"] < 1


def test_unusual_annotations_are_read_correctly(data: Path) -> None:
    """10,000 objects are counted one by one, names are kept apart, a missing area is the mask's."""
    made = {case.what: case.make for case in ANNOTATIONS}

    def dataset(what: str) -> CocoDataset:
        content = good_content()
        made[what](content)
        (data / "train.json").write_text(json.dumps(content))
        return CocoDataset(data / "train.json", data / "images")

    crowded = dataset("10,000 objects in an image")
    ids, counts = seen(crowded)
    assert counts["dropped_objects"] == ids.count(1) * (10_000 - DATA.max_objects)
    assert dataset("a category without a name").class_names == ["cell", "dust", "3"]
    file = dataset("two categories with the same name").annotations
    scores = evaluate_results(file, perfect(good_content()), masks=False)["box"]["per_class"]
    assert list(scores) == ["cell", "dust", "cell (3)"]
    assert dataset("no id").labels_K.tolist() == [0, 0, 0, 0]


@each(IMAGES)
def test_image(case: Case, data: Path, tiny_export: Path, caplog: Any, capsys: Any) -> None:
    path = data / "images/c.png"
    path.unlink()
    content = good_content()
    content["images"][2]["file_name"] = name = case.make(path) or path.name
    if "30,000" in case.what:
        content["images"][2] |= {"width": 30_000, "height": 30_000}
    (data / "train.json").write_text(json.dumps(content))
    dataset = CocoDataset(data / "train.json", data / "images")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        ids, counts = seen(dataset)
        judged = eval_loader(dataset, DATA, 1)
        evaluated = [int(batch.image_ids_B[0]) for batch in judged]
    problems = [problem for problem in validate(data / "train.json", data / "images") if problem.is_error]
    shown = data / "images" / name
    named = [record.message for record in caplog.records if str(shown) in record.message]
    code = cli.main(["predict", str(tiny_export), str(data / "images"), "--output", str(data / "out")])
    out, err = capsys.readouterr()
    if isinstance(case.outcome, Replaced):
        assert set(ids) == {1, 2} and counts == {"replaced_images": replacements(dataset, 3)}
        assert len(named) == 2, "once per loader"
        assert all(matches(case.outcome.reason, message) for message in named)
        assert evaluated == [1, 2, -1] and judged.counters["unreadable_images"] == 1
        assert len(problems) == 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024, "KiB"
    else:
        assert set(ids) == {1, 2, 3} and not counts and evaluated == [1, 2, 3] and not problems
        read = dataset.read_image(2).astype(int)
        assert read.shape == (SIZE[1], SIZE[0], 3)
        if "grey" not in case.what:
            assert (
                np.abs(read[5, 5] - (250, 10, 20)).max() < 16
                and np.abs(read[5, 35] - (10, 240, 30)).max() < 16
            )
    # A command that has no record of the image does not know its name or size.
    is_file = os.path.lexists(path) and not path.is_dir()
    bad = isinstance(case.outcome, Replaced) and is_file and "size" not in case.what
    assert (code, err.count("giantdet: error: 1 of 3 images are left out")) == ((2, 1) if bad else (0, 0)), (
        err
    )
    assert "a.png: " in out and "b.png: " in out, "good images are predicted"
    if case in IMAGES[::6]:
        assert seen(dataset, workers=1) == (ids, counts)


@each(MAPS)
def test_maps(case: Case, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Of six images the first is bad; each is drawn in the first two batches."""
    make_demo(tmp_path, train_images=6, val_images=1, size=64)
    kind, change = case.make
    raw = tiny_run(tmp_path, tmp_path / "out", kind)
    section = raw["giantdet"]["data"]["train"]
    change(tmp_path, section)
    raw["giantdet"]["data"]["train"] = {key: value for key, value in section.items() if value is not None}
    (tmp_path / "run.json").write_text(json.dumps(raw))
    if isinstance(case.outcome, Error):
        ends_with(case.outcome, ["train", "--config", str(tmp_path / "run.json")], capsys)
        return
    run = load_run(tmp_path / "run.json")
    targets = frozenset({"semantic"} if kind == "semantic_fpn" else {"boxes", "masks", "semantic"})
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        assert run.giantdet.data.train is not None
        dataset = open_dataset(run.giantdet.data.train)
        loader = train_loader(dataset, run.giantdet.data, 3, seed=1, targets=targets)
        ids = {int(i) for _ in range(2) for i in next(loader).image_ids_B}
    counts = {name: count for name, count in loader.counters.items() if count and "objects" not in name}
    if isinstance(case.outcome, Skipped):
        assert f"skipped {case.outcome.records} ({case.outcome.kind})" in caplog.text and not counts
    elif isinstance(case.outcome, Replaced):
        assert counts == {"replaced_images": 1} and matches(case.outcome.reason, caplog.text)
        assert ids <= set(dataset.image_ids.tolist()) - {dataset.image_ids[0]}
    else:
        assert not counts and len(ids) == len(dataset) and caplog.text.count("WARNING") >= 1


@each(WEIGHTS)
def test_weights(case: Case, data: Path, tiny_export: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "weights").mkdir()
    raw = run_of(data, {"giantdet.model": {**MODEL, "num_classes": 4}})
    set_path(raw, "giantdet.model.init_weights", str(case.make(tmp_path / "weights", tiny_export)))
    (data / "run.json").write_text(json.dumps(raw))
    ends_with(case.outcome, ["train", "--config", str(data / "run.json")], capsys)
    assert not (tmp_path / "weights/evil").exists(), "code in a pickle was run"


@each(EXPORTS)
def test_export(case: Case, data: Path, tiny_export: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "weights").mkdir()
    export = case.make(tmp_path / "weights", tiny_export)
    ends_with(case.outcome, ["predict", str(export), str(data / "images")], capsys)


@each(COMMANDS)
def test_command(case: Case, data: Path, tiny_export: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    foreign = good_content()
    foreign["categories"] = [
        {"id": number, "name": name} for number, name in (CATEGORIES | {50: "hexagon"}).items()
    ]
    (data / "foreign.json").write_text(json.dumps(foreign))
    known = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    (data / "list.json").write_text(json.dumps({"images": foreign["images"], "categories": known}))
    (data / "voc").mkdir()
    (data / "voc/gone.xml").write_text("<annotation><filename>no_such_image.jpg</filename></annotation>")
    (data / "labelme.json").write_text(json.dumps({"imagePath": "a.png", "shapes": []}))
    for name, part in (("train", slice(0, 2)), ("val", slice(2, 3))):
        (data / f"splits/{name}").mkdir(parents=True)
        content = good_content()
        content |= {key: content[key][part] for key in ("images", "annotations")}
        (data / f"splits/{name}/instances.json").write_text(json.dumps(content))
    (data / "run").mkdir()
    (data / "run/config.json").write_text(json.dumps(run_of(data, {})))
    places = {"export": tiny_export, "data": data, "empty": tmp_path / "empty"}
    ends_with(case.outcome, [argument.format(**places) for argument in case.make], capsys)
    limit_pixels(DATA.max_image_pixels)  # undo the process-wide setting
    if case.what == "predict: one of the files is not an image":
        assert len(list((tmp_path / "empty/out").glob("*.png"))) == 3
        assert (tmp_path / "empty/out/results.json").is_file()


def test_two_ranks_count_together_and_stop_together(tmp_path: Path) -> None:
    """With three of twelve images bad, metrics.jsonl has the sum over the ranks; then all are bad."""
    runs = []
    for name, bad in (("some", 3), ("all", 12)):
        make_demo(tmp_path / name, 12, 0, size=64)
        for path in sorted((tmp_path / name / "train").iterdir())[:bad]:
            path.write_bytes(b"no image")
        raw = tiny_run(tmp_path / name, tmp_path / name / "out", giantdet__train__steps=4)
        del raw["giantdet"]["data"]["val"]
        runs.append(tmp_path / f"{name}.json")
        runs[-1].write_text(json.dumps(raw))
    ended = launch(REPO / "tests/distributed/worker_bad_data.py", 2, *runs)
    assert [end.code for end in ended] == [2, 2], logs(ended)
    errors = [line for end in ended for line in end.err.splitlines() if "giantdet: error" in line]
    assert len(errors) == 1 and "50 images in a row cannot be used" in errors[0], logs(ended)
    dataset = CocoDataset(tmp_path / "some/train.json", tmp_path / "some/train")
    stream = TrainStream(dataset, DATA, 0)
    counts = [stream[k].counts["replaced_images"] for k in range(4 * 2 * 2)]  # steps, ranks, images
    lines = read_metrics(tmp_path / "some/out/metrics.jsonl")
    assert [line.get("replaced_images", 0) for line in lines] == [sum(counts[: 4 * n]) for n in (1, 2, 3, 4)]
    assert lines[-1]["replaced_images"] > 0


def test_a_seed_of_64_bits_seeds_every_step() -> None:
    for seed in (2**63 - 1, -(2**63), 1_763_748_000):
        seed_step(seed, 10**6)


def document() -> str:
    """Return the text of docs/bad-input.md."""
    text = DOCUMENT_HEAD
    for title, cases in TABLE.items():
        text += f"\n## {title}\n\n| input | what happens |\n| --- | --- |\n"
        text += "".join(f"| {case.what} | {told(case.outcome)} |\n" for case in cases)
    return text


def told(outcome: Error | Skipped | Noted | Replaced | Works) -> str:
    if isinstance(outcome, Error):
        return f"error: `{outcome.line}`".replace("|", "\\|")
    if isinstance(outcome, Skipped):
        return f"skipped, counted as `{outcome.kind}`"
    if isinstance(outcome, Noted):
        return f"used, counted as `{outcome.kind}`: {outcome.how}"
    if isinstance(outcome, Replaced):
        return f"image left out, counted as `replaced_images`: `{outcome.reason}`"
    return f"works: {outcome.how}"


DOCUMENT_HEAD = """\
# Bad input

Look up what giantdet does with wrong input. Each row is a case of `tests/test_bad_input.py`, which writes
this page.

- **error**: the command ends with exit code 2 and one line, `giantdet: error: ...`; here `...` stands for
  names and places. When several ranks end for the same reason, the main rank prints the line.
- **skipped**: the record is left out of training and evaluation, and a warning at the start gives the number
  of each kind with an example. `giantdet validate-data` lists every one.
- **used, counted as**: the record is read as it was meant, or without its broken part, in training and in
  evaluation alike. A warning at the start gives the number of each kind with an example.
- **image left out**: found when the image is read. In training the next image takes its place, a warning
  names it, and `replaced_images` in each line of `metrics.jsonl` is the sum over all ranks so far; 50 such
  images in a row are an error. In evaluation it counts as an image without detections, and a warning
  names it.
  `giantdet predict` names it, continues with the others and ends with exit code 2.
- **works**: listed because it may look like a mistake.

Symbolic links, of image folders and of images, are followed wherever they lead: data sets often consist of
them, and only the owner of the disk can create one. A `file_name` that leads out of the folder is skipped.
Only tensors are read from `.pth` and `.pt` files, and nothing in them can run code. The checkpoints of a run
contain more than tensors: resume runs only from folders that you trust.
"""


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == document(), "run python tests/test_bad_input.py to update it"


def test_the_table_is_complete_without_duplicates() -> None:
    assert sum(map(len, TABLE.values())) >= 60
    assert all(len({case.what for case in cases}) == len(cases) for cases in TABLE.values())


if __name__ == "__main__":
    DOCUMENT.write_text(document())
