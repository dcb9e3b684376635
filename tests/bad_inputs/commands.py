"""Commands: their arguments, with {data} for a data set, {export} for an export, {empty} for a folder."""

from __future__ import annotations

from bad_inputs.cases import Case, Error

COMMANDS = [
    Case(
        "predict: no such image", ["predict", "{export}", "no.jpg"], Error("no.jpg: no such image or folder")
    ),
    Case(
        "predict: a folder without images",
        ["predict", "{export}", "{empty}"],
        Error("...: no image in this folder (looked for ...)"),
    ),
    Case(
        "predict: an overlay in place of its image",
        ["predict", "{export}", "{data}/images/a.png", "--output", "{data}/images"],
        Error("...a.png: its overlay would replace it; choose another --output"),
    ),
    Case(
        "predict: one of the images is none",
        ["predict", "{export}", "{data}/images", "{data}/train.json", "--output", "{empty}/out"],
        Error("1 of 4 images are left out, the first: ...train.json: not a readable image ..."),
    ),
    Case(
        "eval: a category that the export does not know",
        [
            "eval",
            "{export}",
            "--annotations",
            "{data}/foreign.json",
            "--images",
            "{data}/images",
            "--workers",
            "0",
        ],
        Error("...: categories [50] are not among those that ..."),
    ),
    Case(
        "eval: no such folder of images",
        ["eval", "{export}", "--annotations", "{data}/train.json", "--images", "{data}/no"],
        Error("the image folder ... does not exist"),
    ),
    Case("export: a folder that is no run", ["export", "{empty}"], Error("config.json: no such file")),
    Case(
        "export: a run without a checkpoint",
        ["export", "{data}/run"],
        Error("...checkpoints: no whole checkpoint here; none at all"),
    ),
    Case(
        "export: a checkpoint that is none",
        ["export", "{data}/run", "--checkpoint", "step_7"],
        Error("...step_7: manifest.json is missing"),
    ),
    Case(
        "plot: a folder that is no run",
        ["plot", "{empty}"],
        Error("...: no metrics.jsonl here; name the folder of a run"),
    ),
    Case("configs: no such folder", ["configs", "{empty}/no"], Error("...: no such folder; ...")),
]
