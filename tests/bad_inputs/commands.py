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
        "predict: an overlay that would replace its image",
        ["predict", "{export}", "{data}/images/a.png", "--output", "{data}/images"],
        Error("...a.png: its overlay would replace it; choose another --output"),
    ),
    Case(
        "predict: one of the files is not an image",
        ["predict", "{export}", "{data}/images", "{data}/train.json", "--output", "{empty}/out"],
        Error("1 of 4 images are left out, the first: ...train.json: not a readable image ..."),
    ),
    Case(
        "predict: a JSON of images, with files instead of their folder",
        [
            "predict",
            "{export}",
            "{data}/images/a.png",
            "{data}/images/b.png",
            "--annotations",
            "{data}/train.json",
        ],
        Error("predict: with --annotations, give one folder: that of its images"),
    ),
    Case(
        "predict: tiles together with multi-scale testing",
        ["predict", "{export}", "{data}/images", "--tta", "--tile", "64", "--output", "{empty}/out"],
        Error(
            "tta (--tta) shows whole images at several scales, and tile (--tile) parts of them: give one of "
            "the two"
        ),
    ),
    Case(
        "predict: an ensemble of one model",
        ["predict", "{export}", "{data}/images", "--fuse", "wbf"],
        Error("predict: with --fuse, give several models or results files, then the images"),
    ),
    Case(
        "eval: several models without --fuse",
        ["eval", "{export}", "{export}", "--annotations", "{data}/train.json", "--images", "{data}/images"],
        Error("eval: an ensemble needs several models, and --fuse to say how to fuse them"),
    ),
    Case(
        "predict: a JSON without a list of images",
        ["predict", "{export}", "{data}/images", "--annotations", "{data}/run/config.json"],
        Error('...config.json: no list "images", as in a COCO JSON'),
    ),
    Case(
        "predict: an image of more pixels than the limit",
        ["predict", "{export}", "{data}/images/a.png", "--max-image-pixels", "100"],
        Error("1 of 1 images are left out, the first: ...raise data.max_image_pixels in the JSON, ..."),
    ),
    Case(
        "validate-data: annotations without a folder of images",
        ["validate-data", "{data}/train.json"],
        Error("validate-data: give a COCO instances JSON and the folder of its images, or --config JSON"),
    ),
    Case(
        "eval: a list of images without annotations, and no file for results",
        [
            "eval",
            "{export}",
            "--annotations",
            "{data}/list.json",
            "--images",
            "{data}/images",
            "--workers",
            "0",
        ],
        Error(
            "...list.json: no annotations, so there are no scores; give --results FILE to write what is found"
        ),
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
        Error("...: category 'hexagon' (id 50) is not among the classes of ...: ..."),
    ),
    Case(
        "eval: no such folder of images",
        ["eval", "{export}", "--annotations", "{data}/train.json", "--images", "{data}/no"],
        Error("the image folder ... does not exist"),
    ),
    Case("export: a folder that is not a run", ["export", "{empty}"], Error("config.json: no such file")),
    Case(
        "export: a run without a checkpoint",
        ["export", "{data}/run"],
        Error("...checkpoints: no complete checkpoint here: no step_N folder"),
    ),
    Case(
        "export: a folder that is not a checkpoint",
        ["export", "{data}/run", "--checkpoint", "step_7"],
        Error("...step_7: manifest.json is missing"),
    ),
    Case(
        "plot: a folder that is not a run",
        ["plot", "{empty}"],
        Error("...: no metrics.jsonl here; name the folder of a run"),
    ),
    Case("configs: no such folder", ["configs", "{empty}/no"], Error("...: no such folder; ...")),
]
