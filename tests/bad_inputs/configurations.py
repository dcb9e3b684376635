"""The JSON of a run: its bytes, changes to a valid one by dotted path, or overrides."""

from __future__ import annotations

from bad_inputs.cases import Case, Error, Works

_WHOLE = (
    '{"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, '
    '"giantdet": {"train": {"steps": 1}}}'
)
CONFIGURATIONS = [
    Case("0 bytes", b"", Error("run.json: line 1, column 1: Expecting value")),
    Case(
        "a comma is missing in line 2",
        b'{"bf16": {}\n "fp16": {}}',
        Error("run.json: line 2, column 2: Expecting ','"),
    ),
    Case("cut off", _WHOLE[:60].encode(), Error("run.json: line 1, column ...")),
    Case("a list", b"[1]", Error("run.json: must be a JSON object, got [1]")),
    Case("UTF-16", _WHOLE.encode("utf-16"), Error("run.json: cannot be read ('utf-8' codec")),
    Case(
        "UTF-8 with a byte order mark",
        b"\xef\xbb\xbf" + _WHOLE.encode(),
        Works("read as if the mark were not there"),
    ),
    Case("100,000 nested lists", b"[" * 100_000, Error("run.json: maximum recursion depth exceeded")),
    Case(
        "a number of 5,000 digits",
        b'{"steps_per_print": %s}' % (b"1" * 5000),
        Error("run.json: Exceeds the limit"),
    ),
    Case("NaN", b'{"gradient_clipping": NaN}', Error("run.json: NaN is not a JSON number")),
    Case(
        "a number beyond float64",
        _WHOLE.replace("0.1", "1e999").encode(),
        Error("lr must be a number, got Infinity"),
    ),
    Case(
        "a whole number beyond float64",
        {"train_batch_size": 10**400},
        Error("train_batch_size must be an integer"),
    ),
    Case("the same key twice", b'{"bf16": {}, "bf16": {}}', Error("run.json: key bf16 is given twice")),
    Case(
        "a key with a line break",
        {"bf\n16": {}},
        Error('key "bf\\n16" or its value contains characters that are not text'),
    ),
    Case(
        "half of a surrogate pair",
        {"giantdet.train.output": "\ud800"},
        Error('key "output" or its value contains'),
    ),
    Case(
        "a path with NUL in it",
        {"giantdet.train.output": "a\0b"},
        Error('key "output" or its value contains'),
    ),
    Case(
        "an unknown key",
        {"train_batchsize": 8},
        Error("unknown key train_batchsize; did you mean train_batch_size?"),
    ),
    Case(
        "an unknown key inside",
        {"giantdet.train.stpes": 8},
        Error("unknown key giantdet.train.stpes; did you mean steps?"),
    ),
    Case(
        "a key that DeepSpeed dropped",
        {"elasticity": {}},
        Error("elasticity was removed from DeepSpeed; ..."),
    ),
    Case("no giantdet block", b'{"train_batch_size": 2}', Error('the "giantdet" block is missing: ...')),
    Case(
        "text for a number",
        {"giantdet.train.steps": "ten"},
        Error('train.steps must be an integer, got "ten"'),
    ),
    Case(
        "true for a number",
        {"zero_optimization.stage": True},
        Error("stage must be one of 0, 1, 2, 3, got true"),
    ),
    Case(
        "a list for a block", {"zero_optimization": []}, Error("zero_optimization must be an object, got []")
    ),
    Case(
        "no batch size at all",
        {"train_micro_batch_size_per_gpu": "auto"},
        Error("give train_batch_size or ..."),
    ),
    Case(
        "an impossible batch triple",
        {"train_batch_size": 3},
        Error("train_batch_size 3 is not ...; nearest possible ..."),
    ),
    Case(
        "an unknown optimizer",
        {"optimizer.type": "AdamX"},
        Error('optimizer.type: "AdamX" is not supported; did you mean ...'),
    ),
    Case(
        "an unknown schedule",
        {"scheduler": {"type": "Cosine"}},
        Error('scheduler.type: "Cosine" is not supported...'),
    ),
    Case(
        "a negative learning rate",
        {"optimizer.params.lr": -1},
        Error("optimizer.params.lr must not be negative, got -1"),
    ),
    Case(
        "one beta",
        {"optimizer.params.betas": [0.9]},
        Error("optimizer.params.betas must be two numbers ..., got [0.9]"),
    ),
    Case(
        "a beta of 2",
        {"optimizer.params.betas": [2, 0.9]},
        Error("optimizer.params.betas must be two numbers ..."),
    ),
    Case(
        "Nesterov momentum without a momentum",
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0, "nesterov": True}}},
        Error("optimizer.params.nesterov needs a momentum, and no dampening"),
    ),
    Case(
        "a schedule of 0 steps",
        {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 0}}},
        Error("scheduler.params.total_num_steps must be at least 1 step, got 0"),
    ),
    Case(
        "milestones that decrease",
        {"scheduler": {"type": "WarmupMultiStepLR", "params": {"milestones": [9, 5]}}},
        Error("scheduler.params.milestones must increase, got [9, 5] ([9, 5] steps)"),
    ),
    Case(
        "a learning rate of 0 with a schedule that has its own",
        {
            "optimizer.params.lr": 0,
            "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 0.1}},
        },
        Error("optimizer.params.lr is 0, and scheduler.params.cycle_max_lr is 0.1: ..."),
    ),
    Case(
        "a learning rate of 0 with a schedule",
        {"optimizer.params.lr": 0, "scheduler": {"type": "WarmupPolyLR", "params": {"warmup_num_steps": 1}}},
        Works("nothing is learned"),
    ),
    Case(
        "an interval of -1 steps",
        {"giantdet.train.eval_every": -1},
        Error("giantdet.train.eval_every must be a number of steps, or a text like ..."),
    ),
    Case(
        "an interval of 2 hours",
        {"giantdet.train.save_every": "2 hours"},
        Error("giantdet.train.save_every must be a number of steps, or a text like ..."),
    ),
    Case(
        "a limit of 0 detections",
        {"giantdet.eval.max_detections": 0},
        Error("giantdet.eval.max_detections must be ..., got 0"),
    ),
    Case(
        "LVIS data in a list of validation sets",
        {
            "giantdet.data.val": [
                {"format": "lvis", "annotations": "lvis.json", "images": "coco"},
                {"annotations": "val.json", "images": "val"},
            ]
        },
        Error("giantdet.data.val has a data set of ... in a list; ... give it alone"),
    ),
    Case(
        "an unknown backend of the evaluation",
        {"giantdet.eval.backend": "hotcocoa"},
        Error("eval.backend must be one of ...; did you mean hotcoco?"),
    ),
    Case(
        "a length of 2 epoks",
        {"giantdet.train.clip_window": ["2 epoks", 5]},
        Error("clip_window must be ..."),
    ),
    Case(
        "bf16 and fp16",
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        Error("... exclude each other; switch one off"),
    ),
    Case(
        "fp16 without ZeRO",
        {"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}},
        Error("fp16.enabled: at zero_optimization.stage 0 ...; set the stage to 1, 2 or 3, or ..."),
    ),
    Case(
        "a canvas of 64 x 72",
        {"giantdet.data.size": [64, 72]},
        Error("data.size must be multiples of 32, got [64, 72]; ..."),
    ),
    Case(
        "a canvas that is neither a side nor a pair",
        {"giantdet.data.size": "640x480"},
        Error('data.size must be one side or [height, width] in pixels, got "640x480"'),
    ),
    Case(
        "steps and epochs",
        {"giantdet.train.epochs": 2},
        Error("give either giantdet.train.epochs or ..., not both"),
    ),
    Case(
        "two ways to scale images",
        {"giantdet.data.augment": {"jitter": [0.5, 2], "short_sides": [64]}},
        Error("jitter and giantdet.data.augment.short_sides exclude each other; drop one"),
    ),
    Case(
        "a seed beyond 64 bits",
        {"giantdet.train.seed": 10**30},
        Error("giantdet.train.seed must be less than 9223372036854775808"),
    ),
    Case(
        "an unknown backbone",
        {"giantdet.model.backbone.name": "resnet51"},
        Error("unknown backbone 'resnet51'; nearest: ..."),
    ),
    Case(
        "frozen stages without weights",
        {"giantdet.model.backbone.frozen_stages": 2},
        Error("giantdet.model.backbone has no weights, and model.backbone.frozen_stages ...: give ..."),
    ),
    Case(
        "a frozen backbone with batch norm over GPUs",
        {"giantdet.model.backbone.frozen": True, "giantdet.norm.type": "cgbn"},
        Error('norm.type cgbn is for a backbone that is trained, ...: set norm.type to "frozen", ...'),
    ),
    Case(
        "a frozen backbone as AGVM's anchor",
        {"giantdet.model.backbone.frozen": True, "giantdet.agvm.enabled": True},
        Error("giantdet.agvm.anchor is the backbone, which has no gradients ...: set agvm.anchor to ..."),
    ),
    Case(
        "an export that leaves out a trained backbone",
        {"giantdet.train.export_backbone": False},
        Error("export_backbone false needs a frozen backbone: set ...backbone.frozen"),
    ),
    Case(
        "a path in a list of data sets",
        {"giantdet.data.train": ["train.json"]},
        Error('giantdet.data.train.0 must be an object, got "train.json"'),
    ),
    Case(
        "fewer classes than categories",
        {"giantdet.model.num_classes": 1},
        Error("num_classes is 1, but ... 2 categories..."),
    ),
    Case(
        "an override without a value",
        ["train.steps"],
        Error("override 'train.steps' is not of the form key=value, ..."),
    ),
    Case(
        "an override of an unknown key",
        ["tarin.steps=3"],
        Error("unknown key tarin.steps; did you mean giantdet.train.steps?"),
    ),
    Case(
        "the name of a key in another trainer",
        ["max_iters=3"],
        Error("unknown key max_iters; did you mean giantdet.train.steps?"),
    ),
    Case(
        "an override that removes a key that is not there",
        ["~optimizer.params.weight_dcay"],
        Error("the run has no key optimizer.params.weight_dcay; did you mean weight_decay?"),
    ),
    Case(
        "an override that removes a key, with a value",
        ["~train.steps=3"],
        Error("override '~train.steps=3' is not of the form key=value, ... or ~key, ..."),
    ),
    Case(
        "another optimizer, which does not know a parameter of the file's",
        ["optimizer.type=SGD", "optimizer.params.betas=[0.9, 0.99]"],
        Error(
            "unknown key optimizer.params.betas of SGD; remove it with the override ~optimizer.params.betas"
        ),
    ),
    Case(
        "an override of 5,000 digits", ["train.steps=" + "1" * 5000], Error("override ... Exceeds the limit")
    ),
    Case(
        "an override that is not UTF-8",
        ["train.output=\udcff"],
        Error("override 'train.output=\\udcff': its value contains characters that are not text"),
    ),
    Case(
        "no such annotations",
        {"giantdet.data.train.annotations": "no.json"},
        Error("data.train.annotations: file no.json does not exist"),
    ),
    Case(
        "a list of data sets, one of them without a file",
        {"giantdet.data.train": [{"annotations": "no.json", "images": "nowhere"}]},
        Error("giantdet.data.train.0.annotations: file no.json does not exist"),
    ),
    Case(
        "a path for a data set",
        {"giantdet.data.train": "train.json"},
        Error('giantdet.data.train must be an object or a list of objects, got "train.json"'),
    ),
    Case(
        "no such image folder",
        {"giantdet.data.val.images": "nowhere"},
        Error("giantdet.data.val.images: folder nowhere does not exist"),
    ),
    Case(
        "a validation set that is not JSON",
        {"giantdet.data.val.annotations": __file__},
        Error("annotations ... are not valid JSON"),
    ),
    Case(
        "an output folder inside a file",
        {"giantdet.train.output": "/dev/null/run"},
        Error("/dev/null...: Not a directory"),
    ),
    Case(
        "a value that DeepSpeed refuses",
        {"zero_optimization.reduce_bucket_size": 0},
        Error("DeepSpeed refuses the run's JSON: ..."),
    ),
    Case(
        "an argument of timm that another key sets",
        {"giantdet.model.backbone.timm_args": {"img_size": 224}},
        Error("giantdet.model.backbone.timm_args.img_size: the model is built for giantdet.data.size; ..."),
    ),
]
