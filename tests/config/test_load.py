"""Reading a run: overrides, and one clear line for each kind of mistake."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from giantdet.config.load import RunConfig, load_run, parse_run
from giantdet.errors import ConfigError

RUN: dict[str, Any] = {
    "$schema": "x.json",
    "about": "a test",
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8},
    "bf16": {"enabled": True},
    "giantdet": {"train": {"steps": 10}, "data": {"size": [512, 512]}},
}


def write(tmp_path: Path, run: Any = RUN) -> Path:
    path = tmp_path / "run.json"
    path.write_text(run if isinstance(run, str) else json.dumps(run))
    return path


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_run(write(tmp_path), list(overrides))


def test_deepspeed_and_giantdet_blocks_are_separated(tmp_path: Path) -> None:
    run = load(tmp_path)
    assert run.giantdet.data.size == (512, 512)
    assert run.about == "a test" and run.path == tmp_path / "run.json"
    assert set(run.deepspeed) == set(RUN) - {"$schema", "about", "giantdet"}


# override, what to read, its value
OVERRIDES = [
    ("giantdet.train.steps=20", lambda r: r.giantdet.train.steps, 20),
    ("train.steps=20", lambda r: r.giantdet.train.steps, 20),
    ("data.size=[64, 96]", lambda r: r.giantdet.data.size, (64, 96)),
    ("data.size=320", lambda r: r.giantdet.data.size, (320, 320)),
    ("data.size=320", lambda r: r.giantdet.data.given()["size"], [320, 320]),
    ("train.output=runs/x=y", lambda r: r.giantdet.train.output, "runs/x=y"),
    ('train.output="7"', lambda r: r.giantdet.train.output, "7"),
    ("norm.type=local", lambda r: r.giantdet.norm.type, "local"),
    ("model.fpn.norm=layer", lambda r: r.giantdet.model.fpn.norm, "layer"),
    ("data.augment.jitter=[0.1, 2]", lambda r: r.giantdet.data.augment.jitter, (0.1, 2.0)),
    ("model.mask_head.enabled=false", lambda r: r.giantdet.model.mask_head.enabled, False),
    ("train_batch_size=32", lambda r: r.deepspeed["train_batch_size"], 32),
    ("train_batch_size=auto", lambda r: r.deepspeed["train_batch_size"], "auto"),
    ("zero_optimization.stage=3", lambda r: r.deepspeed["zero_optimization"]["stage"], 3),
    ("zero_optimization.overlap_comm=auto", lambda r: r.deepspeed["zero_optimization"]["stage"], 2),
    ("optimizer.params.lr=1", lambda r: r.deepspeed["optimizer"]["params"]["lr"], 1),
    ("fp16.loss_scale=0", lambda r: r.deepspeed["fp16"], {"loss_scale": 0}),
    ("train.epochs=1.5", lambda r: (r.giantdet.train.epochs, r.giantdet.train.steps), (1.5, None)),
    (
        'data.train={"annotations": "a.json", "images": "b"}',
        lambda r: r.giantdet.data.train.images,
        "b",
    ),
]


@pytest.mark.parametrize(("override", "read", "expected"), OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_override(tmp_path: Path, override: str, read: Any, expected: Any) -> None:
    assert read(load(tmp_path, override)) == expected


def test_override_of_a_member_creates_the_block_and_keeps_the_rest(tmp_path: Path) -> None:
    run = load(tmp_path, "data.val.annotations=a.json", "data.val.images=b", "zero_optimization.stage=1")
    assert run.giantdet.data.val is not None and run.giantdet.data.val.annotations == "a.json"
    assert run.deepspeed["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 5e8}


def test_the_last_override_of_a_key_counts(tmp_path: Path) -> None:
    """So that a script may have its own, and hand on those of its caller."""
    assert load(tmp_path, "train.steps=3", "giantdet.train.steps=4").giantdet.train.steps == 4
    assert load(tmp_path, "train.epochs=3", "~train.epochs", "train.steps=4").giantdet.train.steps == 4


def test_an_override_removes_a_key(tmp_path: Path) -> None:
    given = load(tmp_path, "~scheduler", "~data.size", "~bf16.enabled")
    assert "scheduler" not in given.deepspeed and given.deepspeed["bf16"] == {}
    assert (
        given.giantdet.data.size == parse_run(RUN | {"giantdet": {"train": {"steps": 1}}}).giantdet.data.size
    )
    params = ["optimizer.params.betas=[0.9, 0.99]", "optimizer.type=SGD", "~optimizer.params.betas"]
    assert load(tmp_path, *params).deepspeed["optimizer"] == {"type": "SGD", "params": {"lr": 1e-4}}


# override(s), fragments of the message
BAD_OVERRIDES: list[tuple[list[str], list[str]]] = [
    (["train.steps"], ["'train.steps'", "key=value"]),
    (["=3"], ["key=value"]),
    (["train..steps=3"], ["key=value"]),
    (["tarin.steps=3"], ["unknown key tarin.steps", "did you mean giantdet.train.steps?"]),
    (["train.stpes=3"], ["unknown key giantdet.train.stpes", "did you mean steps?"]),
    (["pretrained=true"], ["did you mean giantdet.model.backbone.pretrained?"]),
    # Names of settings in other trainers.
    (["learning_rate=3"], ["unknown key learning_rate", "did you mean optimizer.params.lr?"]),
    (["optimizer.lr=3"], ["unknown key optimizer.lr", "did you mean optimizer.params.lr?"]),
    (["optimizer.params.learning_rate=3"], ["learning_rate of AdamW", "did you mean lr?"]),
    (["scheduler.warmup_iters=3"], ["did you mean scheduler.params.warmup_num_steps?"]),
    (["freeze=2"], ["unknown key freeze", "did you mean giantdet.model.backbone.frozen_stages?"]),
    (["model.freeze=2"], ["did you mean giantdet.model.backbone.frozen_stages?"]),
    (["imgsz=640"], ["unknown key imgsz", "did you mean giantdet.data.size?"]),
    (["batch_size=4"], ["unknown key batch_size", "did you mean train_batch_size?"]),
    (["weights=a.pth"], ["unknown key weights", "did you mean giantdet.model.init_weights?"]),
    (["data.train.ann_file=a.json"], ["giantdet.data.train.ann_file", "did you mean annotations?"]),
    (["max_iters=3"], ["unknown key max_iters", "did you mean giantdet.train.steps?"]),
    (["device=cpu"], ["unknown key device; the launcher chooses the devices", "DS_ACCELERATOR=cpu"]),
    (["optimizer=SGD"], ['optimizer must be an object, got "SGD"; set optimizer.type']),
    (["data.train=coco"], ['giantdet.data.train must be an object or a list of objects, got "coco"']),
    (["train_batch_sizes=3"], ["train_batch_sizes", "did you mean train_batch_size?"]),
    (["~train.stpes"], ["the run has no key giantdet.train.stpes", "did you mean steps?"]),
    (["~bf16.enabled.x"], ["the run has no key bf16.enabled.x"]),
    (["~train.steps=3"], ["~key"]),
    (["~"], ["~key"]),
    (["optimizer.params.betas=[0, 0]", "optimizer.type=SGD"], ["with the override ~optimizer.params.betas"]),
    (
        ["train.steps=3", "train.epochs=4"],
        ["either giantdet.train.epochs or giantdet.train.steps", "not both"],
    ),
    (["train.steps=null"], ["neither"]),
    (["train.steps.x=1"], ["giantdet.train.steps is 10, not an object"]),
    (["train.steps=ten"], ["giantdet.train.steps", "an integer", '"ten"']),
    (["train.resume=True"], ["giantdet.train.resume must be true or false", '"True"']),
    (["train.steps=NaN"], ["NaN is not a JSON number"]),
]


@pytest.mark.parametrize(("overrides", "fragments"), BAD_OVERRIDES, ids=[str(b[0]) for b in BAD_OVERRIDES])
def test_bad_override(tmp_path: Path, overrides: list[str], fragments: list[str]) -> None:
    check_error(lambda: load(tmp_path, *overrides), fragments)


def check_error(call: Any, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


# dotted path, value (DELETE to remove it), fragments of the message
DELETE = "(removed)"
BAD: list[tuple[str, Any, list[str]]] = [
    ("train_batch_sise", 8, ["unknown key train_batch_sise", "did you mean train_batch_size?"]),
    ("zero_optimisation", {}, ["unknown key zero_optimisation", "did you mean zero_optimization?"]),
    ("model", {}, ["unknown key model", "giantdet block"]),
    ("lr", 0.1, ["unknown key lr", "did you mean optimizer.params.lr?"]),
    ("elasticity", {}, ["elasticity was removed from DeepSpeed"]),
    ("activation_checkpointing", {}, ["activation_checkpointing", "checkpoint_blocks"]),
    ("zero_optimization.stge", 2, ["unknown key zero_optimization.stge", "did you mean stage?"]),
    ("zero_optimization.stage", 4, ["zero_optimization.stage must be one of 0, 1, 2, 3", "got 4"]),
    ("zero_optimization.stage", True, ["zero_optimization.stage", "got true"]),
    ("zero_optimization", "auto", ["zero_optimization must be an object", '"auto"']),
    ("zero_optimization.stge", "auto", ["unknown key zero_optimization.stge", "did you mean stage?"]),
    ("zero_optimization.offload_param", "auto", ["zero_optimization.offload_param must be an object"]),
    ("zero_optimization.leaf_module", {"names": None}, ["leaf_module.names must be a list", "got null"]),
    ("comms_logger", {"prof_ops": None}, ["comms_logger.prof_ops must be a list"]),
    ("gradient_allreduce_op", None, ['gradient_allreduce_op must be one of "mean", "sum"']),
    ("steps_per_print", 10**400, ["steps_per_print must be an integer"]),
    ("scheduler", None, ["scheduler must be an object, got null"]),
    ("zero_optimization.cpu_offload", True, ["zero_optimization.cpu_offload", "offload_optimizer"]),
    ("zero_optimization.offload_param", {"device": "cpuu"}, ["offload_param.device", "did you mean cpu?"]),
    ("zero_optimization.reduce_bucket_size", 1.5, ["reduce_bucket_size must be an integer"]),
    ("train_batch_size", "8", ["train_batch_size must be an integer", 'or "auto"', '"8"']),
    ("train_batch_size", 0, ["train_batch_size must be at least 1"]),
    ("train_batch_size", True, ["train_batch_size must be an integer"]),
    ("gradient_clipping", -1, ["gradient_clipping must not be negative"]),
    ("bf16", True, ["bf16 must be an object"]),
    ("bf16.enabled", "yes", ["bf16.enabled must be true or false", '"yes"']),
    ("fp16", {"enabled": True}, ["bf16.enabled and fp16.enabled exclude each other"]),
    ("tensorboard", {"outputpath": "x"}, ["tensorboard.outputpath", "did you mean output_path?"]),
    ("optimizer", DELETE, ["optimizer.type is missing", "AdamW"]),
    ("optimizer.type", "AdamX", ["optimizer.type", '"AdamX"', "did you mean"]),
    ("optimizer.type", "OneBitAdam", ['"OneBitAdam" is not supported', "AdamW"]),
    ("scheduler.params.warmup_num_steps", "2 epoks", ["warmup_num_steps must be a number", '"2 epochs"']),
    ("scheduler.params.warmup_num_steps", -5, ["warmup_num_steps must be a number of steps"]),
    ("scheduler.params.warmup_num_steps", 1.5, ["warmup_num_steps must be a number of steps"]),
    ("scheduler.params.warmup_max_lr", [0.1, 0.2], ["warmup_max_lr must be a number"]),
    ("scheduler", {"type": "WarmupMultiStepLR"}, ["scheduler.params.milestones is missing"]),
    ("scheduler", {"type": "WarmupMultiStepLR", "params": {"milestones": 8}}, ["milestones must be a list"]),
    (
        "scheduler",
        {"type": "WarmupMultiStepLR", "params": {"milestones": ["8 epochs", "ten"]}},
        ["milestones.1 must be a number of steps", '"ten"'],
    ),
    (
        "scheduler",
        {"type": "WarmupMultiStepLR", "params": {"milestones": [5, 9], "gamma": [0.1]}},
        ["gamma has 1 values for 2 milestones"],
    ),
    ("giantdet.lr_scaling", {"rule": "cubic"}, ["giantdet.lr_scaling.rule must be", '"linear"']),
    ("giantdet.param_groups", {"layer_decay": 1.5}, ["layer_decay must be at most 1"]),
    ("giantdet.param_groups", {"lr_multipliers": {"fpn": 0}}, ["lr_multipliers.fpn must be greater than 0"]),
    ("giantdet.ema", {"decay": 1.0}, ["giantdet.ema.decay must be less than 1"]),
    (
        "giantdet.train",
        {"steps": 5, "clip_window": ["warmup", 5]},
        ["giantdet.train.clip_window must be", "90000 images"],
    ),
    ("optimizer.params.lr", DELETE, ["optimizer.params.lr is missing"]),
    ("optimizer.params.lr", "auto", ["optimizer.params.lr must be a number"]),
    ("optimizer.params.momentum", 0.9, ["unknown key optimizer.params.momentum of AdamW"]),
    ("optimizer.params.max_grad_norm", 1, ["gradient_clipping"]),
    ("scheduler.type", "WarmupCosine", ["scheduler.type", "did you mean WarmupCosineLR?"]),
    ("scheduler.params.warmup_steps", 5, ["warmup_steps of WarmupLR", "did you mean warmup_num_steps?"]),
    ("scheduler.params.warmup_type", "cubic", ["warmup_type must be one of", '"linear"']),
    ("scheduler.params.warmup_max_lr", "high", ["warmup_max_lr must be a number"]),
    ("scheduler", {"type": "OneCycle"}, ["scheduler.params.cycle_min_lr is missing"]),
    ("about", 3, ["about must be a string or an object"]),
    ("giantdet", DELETE, ['"giantdet" block is missing']),
    ("giantdet", [], ["giantdet must be an object"]),
    ("giantdet.modle", {}, ["unknown key giantdet.modle", "did you mean model?"]),
    ("giantdet.data.max_object", 3, ["unknown key giantdet.data.max_object", "did you mean max_objects?"]),
    ("giantdet.batch_size", 3, ["giantdet.batch_size", "did you mean train_batch_size?"]),
    ("giantdet.data.train", {"images": "x"}, ["giantdet.data.train.annotations is missing"]),
    ("giantdet.data.max_objects", 0, ["giantdet.data.max_objects must be greater than 0", "got 0"]),
    *(
        ("giantdet.data.size", bad, ["data.size must be one side or [height, width] in pixels, got"])
        for bad in ([512], [512, 512, 3], "512x512", 512.5, True, None, {"height": 512})
    ),
    ("giantdet.data.size", 0, ["giantdet.data.size must be greater than 0, got 0"]),
    ("giantdet.data.size", [512, "x"], ["giantdet.data.size.1 must be an integer", '"x"']),
    ("giantdet.data.size", 500, ["multiples of 32", "[500, 500]", "[512, 512]"]),
    ("giantdet.data.size", [512, 500], ["multiples of 32", "[512, 500]", "[512, 512]"]),
    ("giantdet.data.augment", {"flip": 1.5}, ["giantdet.data.augment.flip must be at most 1", "got 1.5"]),
    ("giantdet.data.augment", {"jitter": [2, 0.1]}, ["jitter", "low <= high"]),
    ("giantdet.data.augment", {"jitter": [0, 1]}, ["jitter", "0 < low"]),
    ("giantdet.data.augment", {"jitter": ["a", 1]}, ["giantdet.data.augment.jitter.0 must be a number"]),
    ("giantdet.data.augment", {"jitter": [1, 2], "short_sides": [9]}, ["jitter", "short_sides", "exclude"]),
    ("giantdet.data.augment", {"short_sides": []}, ["short_sides must not be empty"]),
    ("giantdet.model", {"num_classes": "all"}, ['num_classes must be an integer or "auto"', '"all"']),
    ("giantdet.model", {"fpn": {"norm": "layr"}}, ["giantdet.model.fpn.norm", "did you mean layer?"]),
    ("giantdet.model", {"rpn": {"anchor_sizes": [8, 16]}}, ["anchor_sizes", "5 positive numbers"]),
    ("giantdet.model", {"rpn": {"iou_low": 0.9}}, ["iou_low (0.9)", "iou_high (0.7)"]),
    ("giantdet.model", {"backbone": {"drop_path_rate": 1}}, ["drop_path_rate must be less than 1"]),
    (
        "giantdet.model",
        {"backbone": {"pretrained": True, "init_weights": "x"}},
        ["backbone.pretrained", "backbone.init_weights", "exclude"],
    ),
    ("giantdet.train.epochs", 12, ["not both"]),
    ("giantdet.train.steps", DELETE, ["neither"]),
    (
        "giantdet.train",
        {"steps": -1, "seed": "x"},
        ["giantdet.train.steps must be greater than 0", "(and 1 more)"],
    ),
]


@pytest.mark.parametrize(("path", "value", "fragments"), BAD, ids=[f"{b[0]}-{b[1]}"[:60] for b in BAD])
def test_bad_run(tmp_path: Path, path: str, value: Any, fragments: list[str]) -> None:
    run = copy.deepcopy(RUN)
    *parents, last = path.split(".")
    node = run
    for name in parents:
        node = node[name]
    if value is DELETE:
        del node[last]
    else:
        node[last] = value
    check_error(lambda: load_run(write(tmp_path, run)), fragments)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ('{"a": 1,\n "b" 2}', ["run.json: line 2, column 6", "Expecting ':'"]),
        ("", ["run.json: line 1, column 1"]),
        ("[1]", ["run.json: must be a JSON object"]),
        ('{"bf16": {}, "bf16": {}}', ["run.json: key bf16 is given twice"]),
        ('{"giantdet": {"train": {"steps": 1, "steps": 2}}}', ["key steps is given twice"]),
        ('{"gradient_clipping": Infinity}', ["Infinity is not a JSON number"]),
    ],
)
def test_bad_file(tmp_path: Path, text: str, fragments: list[str]) -> None:
    check_error(lambda: load_run(write(tmp_path, text)), fragments)


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path)
    check_error(lambda: load_run(tmp_path / "rum.json"), ["rum.json: no such file", "did you mean run.json?"])


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"\xff\xfe\x00")
    check_error(lambda: load_run(path), ["run.json: cannot be read"])
