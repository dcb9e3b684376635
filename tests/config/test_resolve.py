"""Resolving a run: the batch triple by brute force, every "auto", and printing it back."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from giantdet.config.batch import solve_batch
from giantdet.config.classes import Classes
from giantdet.config.load import RunConfig, load_run, parse_run
from giantdet.config.resolve import check_data, describe, resolve
from giantdet.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
TRIPLE = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def make(
    train: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **deepspeed: Any
) -> RunConfig:
    raw = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, **deepspeed}
    return parse_run({**raw, "giantdet": {"train": train or {"steps": 100}, "model": model or {}}})


# given triple, world size, solved triple
TRIPLES = [
    ((16, 2, 2), 4, (16, 2, 2)),
    ((16, 2, None), 4, (16, 2, 2)),
    ((16, None, 2), 4, (16, 2, 2)),
    ((None, 2, 2), 4, (16, 2, 2)),
    ((16, None, None), 4, (16, 4, 1)),
    ((None, 2, None), 4, (8, 2, 1)),
    (("auto", 2, "auto"), 4, (8, 2, 1)),
    ((16, "auto", "auto"), 1, (16, 16, 1)),
    ((16.0, 2, None), 8, (16, 2, 1)),
]


@pytest.mark.parametrize(("given", "world", "solved"), TRIPLES)
def test_batch_triple(given: tuple[Any, ...], world: int, solved: tuple[int, ...]) -> None:
    config = {key: value for key, value in zip(TRIPLE, given, strict=True) if value is not None}
    assert solve_batch(config, world) == solved


def test_batch_triple_against_brute_force() -> None:
    """For every subset of given values, solve_batch finds a solution if and only if one exists."""
    sizes = [None, 1, 2, 3, 4, 6]
    for world in (1, 2, 3):
        for batch, micro, steps in itertools.product([None, 1, 2, 4, 6, 12, 18], sizes, sizes):
            if batch is None and micro is None:
                continue
            fits = [
                (b, m, s)
                for b, m, s in itertools.product(range(1, 109), range(1, 19), range(1, 19))
                if b == m * s * world
                and (batch in (None, b))
                and (micro in (None, m))
                # DeepSpeed's rule: a single given value means no accumulation.
                and (s == steps if steps else (s == 1 if (batch is None) != (micro is None) else True))
            ]
            config = {k: v for k, v in zip(TRIPLE, (batch, micro, steps), strict=True) if v is not None}
            if fits:
                assert solve_batch(config, world) in fits
                assert len(fits) == 1
            else:
                with pytest.raises(ConfigError, match="nearest possible train_batch_size"):
                    solve_batch(config, world)


@pytest.mark.parametrize(
    ("given", "world", "nearest"),
    [
        ((10, 4, None), 2, 8),
        ((3, 4, None), 2, 8),
        ((16, 2, 3), 2, 12),
        ((7, None, None), 2, 8),
        ((15, 2, None), 2, 16),
    ],
)
def test_impossible_triple_names_the_numbers_and_the_nearest(
    given: tuple[Any, ...], world: int, nearest: int
) -> None:
    config = {key: value for key, value in zip(TRIPLE, given, strict=True) if value is not None}
    with pytest.raises(ConfigError) as caught:
        solve_batch(config, world)
    message = str(caught.value)
    assert f"train_batch_size {given[0]} is not" in message and f"x {world} processes" in message
    assert message.endswith(f"nearest possible train_batch_size: {nearest}")
    # The proposed batch works.
    config["train_batch_size"] = nearest
    assert solve_batch(config, world)[0] == nearest


def test_no_batch_at_all() -> None:
    with pytest.raises(ConfigError, match="give train_batch_size or train_micro_batch_size_per_gpu"):
        solve_batch({"gradient_accumulation_steps": 2}, 2)


@pytest.mark.parametrize(("epochs", "images", "steps"), [(1, 16, 2), (1, 17, 3), (2.5, 16, 5), (0.1, 8, 1)])
def test_steps_from_epochs(epochs: float, images: int, steps: int) -> None:
    run = resolve(make({"epochs": epochs}), 2, train_images=images)
    assert (run.giantdet.train.steps, run.giantdet.train.epochs) == (steps, None)


def test_steps_stay_unresolved_without_data() -> None:
    scheduler = {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto"}}
    run = resolve(make({"epochs": 3}, scheduler=scheduler), 2)
    assert run.giantdet.train.steps is None and run.giantdet.model.num_classes == "auto"
    assert run.deepspeed["scheduler"]["params"]["total_num_steps"] == "auto"


def test_no_images() -> None:
    with pytest.raises(ConfigError, match="no image to train on"):
        resolve(make({"epochs": 3}), 2, train_images=0)


@pytest.mark.parametrize(("declared", "found", "resolved"), [("auto", 80, 80), (90, 80, 90), (80, 80, 80)])
def test_num_classes(declared: Any, found: int, resolved: int) -> None:
    run = resolve(make(model={"num_classes": declared}), 2, classes=Classes.numbered(found))
    assert run.giantdet.model.num_classes == resolved


def test_too_few_classes() -> None:
    with pytest.raises(ConfigError, match="num_classes is 3, but the training annotations have 80"):
        resolve(make(model={"num_classes": 3}), 2, classes=Classes.numbered(80, 54))


def scheduler_of(kind: str, params: dict[str, Any], steps: int = 2000) -> dict[str, Any]:
    run = make({"steps": steps}, scheduler={"type": kind, "params": params})
    return resolve(run, 2).deepspeed["scheduler"]["params"]


RUN_OF_2 = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
FPN_BATCH = {"fpn": {"norm": "batch"}}
UPERNET = {"type": "upernet", "num_classes": 3}


@pytest.mark.parametrize(
    ("norm", "model", "words"),
    [
        ({"fpn": {"type": "local"}}, {}, ["giantdet.norm.fpn", "giantdet.model.fpn"]),
        ({"heads": {"type": "local"}}, FPN_BATCH, ["giantdet.norm.heads", "giantdet.model.box_head"]),
        ({"fpn": {"type": "local"}}, UPERNET, ["giantdet.norm.fpn", "upernet has no such part"]),
    ],
)
def test_norms_for_parts_without_batch_norm(
    norm: dict[str, Any], model: dict[str, Any], words: list[str]
) -> None:
    raw = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "giantdet": {"train": {"steps": 1}},
    }
    raw["giantdet"] |= {"norm": norm, "model": model}
    with pytest.raises(ConfigError) as caught:
        resolve(parse_run(raw), world_size=4)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_valid_norms_for_parts() -> None:
    raw = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "giantdet": {"train": {"steps": 1}},
    }
    parts = {"type": "cgbn", "bn_size": 4, "fpn": {"type": "cgbn"}, "heads": {"type": "frozen"}}
    raw["giantdet"] |= {"norm": parts, "model": FPN_BATCH | {"mask_head": {"norm": "batch"}}}
    norm = resolve(parse_run(raw), world_size=4).giantdet.norm
    assert [norm.of(part).type for part in ("backbone", "fpn", "heads")] == ["cgbn", "cgbn", "frozen"]
    assert (norm.bn_size, norm.of("fpn").bn_size) == (4, 32)


def test_scheduler_autos() -> None:
    auto = {"warmup_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto"}
    assert scheduler_of("WarmupLR", auto) == {
        "warmup_num_steps": 100,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 1e-4,
        "warmup_type": "log",
    }
    assert scheduler_of("WarmupDecayLR", auto) == {
        "warmup_num_steps": 100,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 1e-4,
        "total_num_steps": 2000,
        "warmup_type": "log",
    }
    cosine = {"warmup_num_steps": 7, "warmup_type": "linear"}
    assert scheduler_of("WarmupCosineLR", cosine) == {**cosine, "total_num_steps": 2000}
    assert scheduler_of("warmupcosinelr", {"warmup_num_steps": "auto"}, 10**6)["warmup_num_steps"] == 500
    assert scheduler_of("WarmupLR", {"warmup_num_steps": "auto"}, 5)["warmup_num_steps"] == 1
    # DeepSpeed's default maximum, 0.001, would ignore the optimizer's LR.
    assert scheduler_of("WarmupDecayLR", {})["warmup_max_lr"] == 1e-4


def test_explicit_scheduler_values_are_kept() -> None:
    params = {"warmup_num_steps": 3, "warmup_max_lr": 0.5, "total_num_steps": 9, "warmup_type": "linear"}
    assert scheduler_of("WarmupDecayLR", params) == params


def test_clipping_is_always_explicit() -> None:
    assert resolve(make(), 2).deepspeed["gradient_clipping"] == 0.0
    assert resolve(make(gradient_clipping="auto"), 2).deepspeed["gradient_clipping"] == 0.0
    assert resolve(make(gradient_clipping=1.0), 2).deepspeed["gradient_clipping"] == 1.0


def test_optimizers() -> None:
    sgd = {"type": "sgd", "params": {"lr": 0.1}}
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    cpu = resolve(make(zero_optimization={"stage": 2}), 2, has_gpu=False).deepspeed
    assert cpu["optimizer"]["params"]["torch_adam"] is True
    assert "zero_allow_untested_optimizer" not in cpu and "zero_force_ds_cpu_optimizer" not in cpu
    assert resolve(make(), 2, has_gpu=True).deepspeed["optimizer"]["params"]["torch_adam"] is True
    gpu_offload = resolve(make(zero_optimization=offload), 2, has_gpu=True).deepspeed
    assert "torch_adam" not in gpu_offload["optimizer"]["params"]  # DeepSpeedCPUAdam, compiled with g++
    tested = resolve(make(zero_optimization={"stage": 2}, optimizer=sgd), 2).deepspeed
    assert tested["zero_allow_untested_optimizer"] is True and tested["optimizer"]["type"] == "SGD"
    assert "zero_allow_untested_optimizer" not in resolve(make(optimizer=sgd), 2).deepspeed
    offloaded = resolve(make(zero_optimization=offload, optimizer=sgd), 2).deepspeed
    assert offloaded["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("name", ["Lamb", "Lars", "Muon"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_optimizers_that_need_whole_weights_need_stage_0(name: str, stage: int) -> None:
    run = make(optimizer={"type": name.upper(), "params": {"lr": 0.1}}, zero_optimization={"stage": stage})
    if stage == 0:
        assert resolve(run, 2).deepspeed["optimizer"]["type"] == name
        return
    with pytest.raises(
        ConfigError, match=f"{name} works on whole weights.*stage {stage}.*set the stage to 0"
    ):
        resolve(run, 2)


def test_lengths() -> None:
    """100 images per epoch, batch 8: an epoch is 12.5 steps."""
    params = {"milestones": [7, "2 epochs", "240 images", "40 steps"], "warmup_num_steps": "1 epoch"}
    run = make(scheduler={"type": "WarmupMultiStepLR", "params": params})
    found = resolve(run, 2, train_images=100).deepspeed["scheduler"]["params"]
    assert found == {
        "milestones": [7, 25, 30, 40],
        "warmup_num_steps": 13,  # rounded up, like the length of the run in epochs
        "warmup_type": "linear",
        "warmup_min_ratio": 1e-3,
    }
    # Without a data set a number of epochs stays unresolved.
    unknown = resolve(run, 2).deepspeed["scheduler"]["params"]
    assert unknown["milestones"] == [7, "2 epochs", 30, 40] and unknown["warmup_num_steps"] == "1 epoch"
    with pytest.raises(ConfigError, match="milestones must increase"):
        wrong = {"milestones": [20, "1 epoch"]}
        resolve(make(scheduler={"type": "WarmupMultiStepLR", "params": wrong}), 2, train_images=100)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_lr_scaling(world: int, rule: str, factor: float) -> None:
    raw: dict[str, Any] = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "SGD", "params": {"lr": 0.02, "weight_decay": 1e-4}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 5}},
        "giantdet": {"train": {"steps": 9}, "lr_scaling": {"reference_batch": 16, "rule": rule}},
    }
    run = resolve(parse_run(raw), world)
    assert run.deepspeed["optimizer"]["params"] == {"lr": 0.02 * factor, "weight_decay": 1e-4}
    assert run.deepspeed["scheduler"]["params"]["warmup_max_lr"] == 0.02 * factor
    # The config.json in the run's folder resolves to itself, without scaling twice.
    assert resolve(parse_run(json.loads(describe(run))), world).deepspeed == run.deepspeed
    raw["scheduler"] = {
        "type": "WarmupMultiStepLR",
        "params": {"milestones": [5], "warmup_min_ratio": "auto"},
    }
    ratio = resolve(parse_run(raw), world).deepspeed["scheduler"]["params"]["warmup_min_ratio"]
    assert ratio == (1e-3 if rule == "none" else 1 / factor), "MegDet warms up from the reference's LR"
    raw["giantdet"]["lr_scaling"] = {"rule": rule}
    if rule != "none":
        with pytest.raises(ConfigError, match="reference_batch, the batch that the learning rate"):
            resolve(parse_run(raw), world)


def test_average_needs_the_weights_in_memory() -> None:
    raw = json.loads(describe(make(zero_optimization={"stage": 3, "offload_param": {"device": "nvme"}})))
    resolve(parse_run(raw), 2)
    raw["giantdet"]["ema"] = {"enabled": True}
    with pytest.raises(ConfigError, match="ema needs the weights in memory"):
        resolve(parse_run(raw), 2)


@pytest.mark.parametrize("offload", [{"device": "nvme"}, {"device": "cpu", "ratio": 0.5}])
def test_checkpoints_need_the_optimizer_state_in_one_memory(offload: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="offload_optimizer: checkpoints need the optimizer's state in one"):
        resolve(make(zero_optimization={"stage": 3, "offload_optimizer": offload}), 2)
    resolve(make(zero_optimization={"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 1.0}}), 2)


def test_clip_window() -> None:
    warmup = {"type": "WarmupPolyLR", "params": {"warmup_num_steps": 150}}

    def window(given: Any, **more: Any) -> Any:
        settings = {"gradient_clipping": 1.0, "scheduler": warmup, **more}
        run = make({"steps": 2000, "clip_window": given}, **settings)
        return resolve(run, 2, train_images=80).giantdet.train.clip_window

    assert window(None) is None
    assert window("auto") == (50, 250)
    assert window([3, "2 epochs"]) == (3, 20)
    with pytest.raises(ConfigError, match="give the first step first"):
        window([30, "2 epochs"])
    with pytest.raises(ConfigError, match="gradient_clipping is 0"):
        window("auto", gradient_clipping=0.0)


def test_autos_of_deepspeed_blocks_are_dropped_without_changing_the_input() -> None:
    run = make(
        zero_optimization={"stage": 3, "overlap_comm": "auto", "offload_param": {"pin_memory": "auto"}}
    )
    before = describe(run)
    assert resolve(run, 2).deepspeed["zero_optimization"] == {"stage": 3, "offload_param": {}}
    assert describe(run) == before


def test_check_data(tmp_path: Path) -> None:
    run = parse_run(
        {
            "optimizer": {"type": "SGD", "params": {"lr": 1}},
            "giantdet": {
                "train": {"steps": 1},
                "data": {
                    "train": {"annotations": str(tmp_path / "train.json"), "images": str(tmp_path / "images")}
                },
            },
        }
    )
    (tmp_path / "trian.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"data\.train\.annotations: file .* does not exist; did you mean trian\.json\?"
    ):
        check_data(run)
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"data\.train\.images: folder .* does not exist"):
        check_data(run)
    (tmp_path / "images").mkdir()
    check_data(run, ["train"])
    with pytest.raises(ConfigError, match=r"data\.val is missing"):
        check_data(run)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipe_resolves_and_round_trips(recipe: Path, tmp_path: Path) -> None:
    run = load_run(recipe)
    assert isinstance(run.about, dict) and f"ds_configs/{recipe.name}" in run.about["command"]
    gpus = run.about["gpus"]
    for world in (gpus, 2):
        resolved = resolve(run, world, train_images=117_266, classes=Classes.numbered(80, 54))
        text = describe(resolved)
        # The backend of the evaluation depends on the machine that runs it.
        assert text.count('"auto"') == text.count('"backend": "auto"') == 1
        printed = tmp_path / "printed.json"
        printed.write_text(text)
        again = load_run(printed)
        assert (again.giantdet, again.deepspeed, again.about) == (
            resolved.giantdet,
            resolved.deepspeed,
            resolved.about,
        )
        # Nothing is left to resolve.
        assert describe(resolve(again, world, train_images=1, classes=Classes.numbered(80, 54))) == text
    # No accumulation on the hardware that the recipe is meant for.
    assert resolve(run, gpus, 117_266).deepspeed["gradient_accumulation_steps"] == 1
    assert {"what", "command", "hardware", "time", "expected"} <= set(run.about)
    stem_batch = [int(part) for part in recipe.stem.split("_") if part.isdigit()]
    assert stem_batch in ([], [run.deepspeed["train_batch_size"]])


def test_recipes_exist() -> None:
    assert len(RECIPES) >= 10
