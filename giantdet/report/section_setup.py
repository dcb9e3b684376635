"""The head of a page, and sections on what a run was made of: data, settings, versions."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from shlex import quote
from typing import Any

from giantdet.config.load import parse_run
from giantdet.config.resolve import describe
from giantdet.errors import InputError
from giantdet.report.differences import ABSENT, Difference, differences
from giantdet.report.figures import bars
from giantdet.report.page import Html, chart, code, folded, grid, joined, number, paragraph, table, tag
from giantdet.report.run import Missing, Run
from giantdet.report.section_scores import PRIMARY, SHOWN_CLASSES

_NOT_COMPARED = ("about", "$schema", "giantdet.data.classes", "giantdet.train.output")


def title(run: Run) -> str:
    """Return the title of the page."""
    return f"{run.folder.absolute().name}: {run.config.giantdet.model.type}"


def head(run: Run) -> Html:
    """Return the summary: model, data, best score, time, machines, where the results are, what to do next."""
    config = run.config.giantdet
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    done = int(run.logged[-1]["step"]) if run.logged else 0
    cards = [
        (config.model.type, f"{config.model.backbone.name}, {parameters / 1e6:,.1f} M parameters"),
        *_best(run),
        (
            f"{done:,} of {config.train.steps:,} steps" if done != config.train.steps else f"{done:,} steps",
            f"batch {run.images_per_step:,}"
            + ("" if run.epoch_steps is None else f", {done / run.epoch_steps:,.1f} epochs"),
        ),
        *_data_cards(run),
        *_machine(run),
    ]
    shown = [tag("div", tag("b", big), tag("span", small), class_="card") for big, small in cards]
    return joined(
        [
            tag("h1", run.folder.absolute().name),
            tag("p", _about(run) or str(run.folder.absolute()), class_="lead"),
            tag("div", *shown, class_="cards"),
            _next(run),
        ]
    )


def _about(run: Run) -> str:
    about = run.config.about
    return about if isinstance(about, str) else str((about or {}).get("what", ""))


def _best(run: Run) -> list[tuple[str, str]]:
    """Return the best evaluation by the number that runs are compared by, and the last if it is another."""
    found = []
    for line in run.evaluated:
        task = next((task for task in reversed(run.model.tasks) if task in line["scores"]), None)
        value = None if task is None else line["scores"][task].get(PRIMARY[task])
        if value is not None and value >= 0:
            found.append((float(value), int(line["step"]), f"{task} {PRIMARY[str(task)]}"))
    if not found:
        return []
    best = max(found, key=lambda one: (one[0], one[1]))
    cards = [(number(best[0]), f"{best[2]}, the best, after step {best[1]:,}")]
    if found[-1][1] != best[1]:
        cards.append((number(found[-1][0]), f"{best[2]} at the end"))
    return cards


def _data_cards(run: Run) -> list[tuple[str, str]]:
    cards = []
    for split, summary in run.summaries.items():
        objects = f", {summary['objects']:,} objects" if summary.get("objects") else ""
        cards.append((f"{summary['images']:,}", f"{split} images{objects}"))
    return cards


def _machine(run: Run) -> list[tuple[str, str]]:
    cards = []
    seconds = 0.0
    before = 0
    for line in run.logged:
        if line["images_per_second"]:
            seconds += (line["step"] - before) * run.images_per_step / line["images_per_second"]
        before = line["step"]
    if seconds:
        wall = ""
        if run.sessions:
            # Not of other files: a finished run that is started again writes them again.
            files = [*(run.folder / "checkpoints").glob("*"), run.folder / "metrics.jsonl"]
            end = max(map(os.path.getmtime, files[:-1] or files))
            started = datetime.fromisoformat(run.sessions[0]["started"])
            passed = (datetime.fromtimestamp(end, UTC) - started).total_seconds()
            wall = f", {duration(passed)} since the first start"
        cards.append((duration(seconds), f"of steps{wall}"))
    if run.sessions:
        last = run.sessions[-1]
        cards.append(
            (f"{last['ranks']} × {last['device']}", f"ZeRO-{run.config.stage}, {run.config.precision}")
        )
    else:
        cards.append((f"ZeRO-{run.config.stage}", run.config.precision))
    return cards


def duration(seconds: float) -> str:
    """Return a time as text: "45 s", "12 min", "3 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _next(run: Run) -> Html:
    """Return where the results of a run are, and the commands that come next."""
    folder = run.folder
    rows: list[tuple[str, object]] = []
    if (folder / "export").is_dir():
        rows.append(("Model", code(folder / "export")))
        rows.append(
            ("Predict", code(f"giantdet predict {quote(str(folder / 'export'))} IMAGES --output predictions"))
        )
    elif (folder / "checkpoints").is_dir():
        rows.append(("The run has no export yet", code(f"giantdet export {quote(str(folder))}")))
    results = sorted(path.name for path in folder.glob("results*.json"))
    if results:
        rows.append(("Predictions for the validation images", code(", ".join(results))))
    rows.append(("This page again", code(f"giantdet report {quote(str(folder))}")))
    return tag(
        "div",
        tag("dl", *(joined([tag("dt", name), tag("dd", value)]) for name, value in rows)),
        class_="next",
    )


def data(run: Run) -> Html:
    """Return the numbers of the data sets, and the objects of each class."""
    if not run.summaries:
        raise Missing("there is no data.json")
    head = ["", *run.summaries]
    rows = []
    names = {
        "images": "images",
        "images_without_objects": "images without objects",
        "objects": "objects",
        "without_mask": "objects without a mask",
        "tiny": "objects narrower than a pixel",
        "crowds": "crowd regions",
        "ignored": "ignored objects",
    }
    for key, words in names.items():
        values = [summary.get(key, 0) for summary in run.summaries.values()]
        if any(values):
            rows.append((words, *(f"{value:,}" for value in values)))
    parts = [table(head, rows)]
    for split, summary in run.summaries.items():
        lost = {**summary.get("left_out", {}), **summary.get("used_otherwise", {})}
        if lost:
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in lost.items())
            parts.append(paragraph(f"{split}: records left out or used not as written: {kinds}"))
    counts = {split: summary.get("objects_per_class") or {} for split, summary in run.summaries.items()}
    classes = list(dict.fromkeys(name for split in counts.values() for name in split))
    if any(counts["train"].values() if "train" in counts else ()):
        ordered = sorted(classes, key=lambda name: -counts["train"].get(name, 0))
        note = ""
        if len(ordered) > SHOWN_CLASSES:
            half = SHOWN_CLASSES // 2
            note = f"The {half} most frequent and the {half} rarest of {len(ordered)} classes."
            ordered = ordered[:half] + ordered[-half:]
        objects = {name: [counts["train"].get(name, 0)] for name in ordered}
        svg = bars(run.pictures / "classes_of_data.png", objects, ["train"], "objects")
        parts.append(grid([chart(svg, "Training objects by class", note)]))
    return joined(parts)


def settings(run: Run) -> Html:
    """Return what differs from the recipe, or from the defaults, and the whole resolved JSON."""
    recipe = run.sessions[-1]["recipe"] if run.sessions else None
    now = run.raw
    parts = []
    if recipe is not None:
        # As the recipe was written: values that it leaves to the defaults are compared, too.
        try:
            before = json.loads(describe(parse_run(recipe["content"])))
        except InputError:
            before = recipe["content"]
        found = _worth(differences(before, now))
        parts.append(paragraph("Recipe: ", code(recipe["path"])))
        parts.append(
            table(["Key", "in the recipe", "in this run"], map(_row, found), words=3)
            if found
            else paragraph("The run is the recipe as it is written.")
        )
        parts.append(
            paragraph("“auto” was resolved for this data set and these machines; the rest was overridden.")
        )
    else:
        found = _worth(differences({"giantdet": _defaults(run)}, now))
        parts.append(paragraph("The recipe was not recorded; these are the differences from the defaults."))
        parts.append(table(["Key", "default", "in this run"], map(_row, found), words=3))
    parts.append(
        folded("The resolved JSON of the run", tag("pre", json.dumps(now, indent=2, ensure_ascii=False)))
    )
    return joined(parts)


def _defaults(run: Run) -> dict[str, Any]:
    """Return the giantdet block with all defaults, of the same architecture."""
    model = run.config.giantdet.model
    name = {"name": model.backbone.name}
    block = parse_run(
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 1.0}},
            "giantdet": {"model": {"type": model.type, "backbone": name}, "train": {"steps": 1}},
        }
    )
    defaults: dict[str, Any] = json.loads(describe(block))["giantdet"]
    return defaults


def _worth(found: list[Difference]) -> list[Difference]:
    return [one for one in found if not one.key.startswith(_NOT_COMPARED)]


def _row(one: Difference) -> tuple[Html, ...]:
    return (code(one.key), *(code(v if v == ABSENT else json.dumps(v, ensure_ascii=False)) for v in one[1:]))


def versions(run: Run) -> Html:
    """Return the versions and the machines of each start of the run."""
    if not run.sessions:
        raise Missing("there is no environment.json: the run is from an earlier version of giantdet")
    names = list(dict.fromkeys(name for session in run.sessions for name in session["versions"]))
    head = ["", *(f"from step {session['first_step'] + 1}" for session in run.sessions)]
    rows: list[list[object]] = [
        [key, *(session[key] for session in run.sessions)] for key in ("started", "host", "ranks", "device")
    ]
    rows += [[name, *(session["versions"].get(name, ABSENT) for session in run.sessions)] for name in names]
    return table(head, rows, words=1 + len(run.sessions))
