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
        "validate-data: a folder of Pascal VOC in place of a COCO JSON",
        ["validate-data", "{data}/voc", "{data}/images"],
        Error(
            "cannot read the annotations ...voc: Is a directory; this looks like Pascal VOC: "
            "`giantdet import-data voc ...voc OUT` makes a COCO JSON of it"
        ),
    ),
    Case(
        "validate-data: a labelme file in place of a COCO JSON",
        ["validate-data", "{data}/labelme.json", "{data}/images"],
        Error(
            'annotations ... have no list "images"; ...; this looks like labelme: `giantdet import-data ...'
        ),
    ),
    Case(
        "import-data: no such source",
        ["import-data", "voc", "{data}/nothing", "{empty}"],
        Error("...nothing does not exist"),
    ),
    Case(
        "import-data: annotations of no known format",
        ["import-data", "auto", "{empty}", "{data}/new"],
        Error("...: its format is not recognised; name it, one of voc, yolo, ..."),
    ),
    Case(
        "import-data: another format than the one named",
        ["import-data", "voc", "{data}/images", "{empty}"],
        Error("...images has no .xml file"),
    ),
    Case(
        "import-data: no image is where the annotations say",
        ["import-data", "voc", "{data}/voc", "{empty}", "--images", "{empty}"],
        Error("...: no image can be used as Pascal VOC, e.g. gone.xml: no_such_image.jpg"),
    ),
    Case(
        "import-data: a folder with JSON files in it",
        ["import-data", "voc", "{data}/voc", "{data}"],
        Error("... has foreign.json already; name a new folder, or add --overwrite"),
    ),
    Case(
        "import-data: a share for validation, but there is such a set",
        [
            "import-data",
            "coco",
            "{data}/splits",
            "{empty}",
            "--images",
            "{data}/images",
            "--val-share",
            "0.5",
        ],
        Error("the source has a validation set of its own; leave out --val-share"),
    ),
    Case(
        "new: annotations that do not name the folder of their images",
        ["new", "{empty}/run.json", "--data", "{data}/train.json"],
        Error("...train.json does not tell where its images are; give their folder with --images"),
    ),
    Case(
        "new: a size that is none, and no recipe",
        ["new", "{empty}/run.json", "--data", "{data}/train.json", "--size", "demmo"],
        Error("demmo: no such recipe; did you mean demo?; `giantdet configs` lists them"),
    ),
    Case(
        "new: a run that exists",
        ["new", "{data}/run/config.json", "--data", "{data}/train.json"],
        Error("...config.json exists; name another file, or add --overwrite"),
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
    Case(
        "report: a folder that is not a run",
        ["report", "{empty}"],
        Error("...: no config.json in it; give the folder of a run, its train.output"),
    ),
    Case("configs: no such folder", ["configs", "{empty}/no"], Error("...: no such folder; ...")),
]
