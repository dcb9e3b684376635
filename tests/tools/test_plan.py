"""The plan against DeepSpeed: bytes of weights and states at every stage, and the memory of a step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import MODEL, REPO, launch_ok, tiny_run

from giantdet.config.load import RunConfig, load_run
from giantdet.config.resolve import resolve
from giantdet.engine.zero import weight_dtype
from giantdet.errors import ConfigError
from giantdet.tools.costs import GIB, states
from giantdet.tools.count import Count, count, meta_model
from giantdet.tools.machines import MACHINES, Machine, machine_of
from giantdet.tools.measure import largest, start
from giantdet.tools.plan import Plan, make_plan, report

WORKER = REPO / "tests/distributed/worker_plan.py"
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "AdamW", "params": {"lr": 1e-4}},
    "SGD": {"type": "SGD", "params": {"lr": 1e-4, "momentum": 0.9}},
}
# Large enough that DeepSpeed's padding of partitions is negligible.
BACKBONE = {"name": "resnet18", "frozen_stages": 2}


@pytest.fixture(scope="module", autouse=True)
def counted_once() -> Iterator[None]:
    """Count each model once, because plans of the same model for other machines need no second count."""
    found: dict[Any, Count] = {}

    def count_once(run: RunConfig, images: int) -> Count:
        key = run.giantdet.model.model_dump_json(), run.giantdet.data.size, weight_dtype(run), images
        if key not in found:
            found[key] = count(run, images)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("giantdet.tools.plan.count", count_once)
        yield


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(tiny_run(path.parent, path.parent, **changes)))
    return path


@pytest.mark.parametrize("world", [1, 2, 4])
def test_states_equal_deepspeeds(tmp_path: Path, world: int) -> None:
    model = {**MODEL, "backbone": BACKBONE, "num_classes": 4}
    # All cases on two ranks; on one and four only what depends on the number of ranks.
    paths = {}
    for stage in range(4):
        for name in ["AdamW", "SGD"] if world == 2 and stage in (0, 3) else ["AdamW"]:
            for bf16 in (False, True) if world == 2 and name == "AdamW" else (world != 2,):
                paths[f"{name}{stage}{bf16}"] = write(
                    tmp_path / f"{name}{stage}{bf16}.json",
                    zero_optimization__stage=stage,
                    optimizer=OPTIMIZERS[name],
                    bf16={"enabled": bf16},
                    giantdet__model=model,
                )
    for stage in (2, 3) if world == 2 else ():
        offload = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
        paths[f"offload{stage}"] = write(
            tmp_path / f"offload{stage}.json",
            zero_optimization=offload,
            bf16={"enabled": True},
            giantdet__model=model,
        )
    for stage in range(4) if world == 2 else ():
        paths[f"frozen{stage}"] = write(
            tmp_path / f"frozen{stage}.json",
            zero_optimization__stage=stage,
            bf16={"enabled": True},
            giantdet__model={**model, "backbone": {"name": "resnet18", "frozen": True}},
        )
    launch_ok(WORKER, world, tmp_path / "found.json", *paths.values())
    found = json.loads((tmp_path / "found.json").read_text())
    for name, path in paths.items():
        run = resolve(load_run(path), world, 100)
        host = found[name].pop("host_gradients")
        if name.startswith("offload"):
            assert host == pytest.approx(found[name]["master"], rel=0.02)
            plan = Plan(run, world, MACHINES["h200"], 50e9, 0.4)
            assert plan.own.offload
            assert plan.own.host == pytest.approx(
                host + found[name]["master"] + found[name]["moments"], rel=0.02
            )
        parameters = list(meta_model(run).parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        every, each = sum(p.numel() for p in parameters), weight_dtype(run).itemsize
        assert every > 11e6 and (trainable < 0.1e6 if name.startswith("frozen") else trainable > 10e6)
        moments, stage = (
            run.optimizer.MOMENTS,
            run.deepspeed["zero_optimization"]["stage"],
        )
        assert found[name].pop("bucket") == (trainable if stage else 0)
        predicted = states(every, trainable, each, moments, stage, world)
        for kind, real in found[name].items():
            print(
                f"{name}, {world}: {kind} {getattr(predicted, kind) / 2**20:.2f} MiB, real {real / 2**20:.2f}"
            )
            assert getattr(predicted, kind) == pytest.approx(real, rel=0.02), (name, kind)


STEPS = [
    ("resnet18", ""),
    ("vit_tiny_patch16_224", ""),
    ("vit_tiny_patch16_224", "checkpoint_blocks"),
    ("vit_tiny_patch16_224", "frozen"),
    ("swin_tiny_patch4_window7_224", ""),
    ("convnext_atto", ""),
]


def test_memory_of_a_step(tmp_path: Path) -> None:
    """The peak memory of a process in a real step on the CPU, to 15%.

    resnet18 has a larger canvas and no checkpointing: in a smaller step, internal buffers of convolutions,
    which no tensor shows, are 16% (docs/plan.md).
    """
    paths = {}
    for name, option in STEPS:
        backbone = {"name": name} | ({option: True} if option else {})
        paths[name, option] = write(
            tmp_path / f"peak_{name}_{option}.json",
            giantdet__model={**MODEL, "backbone": backbone, "num_classes": 4, "fpn": {"channels": 32}},
            giantdet__data__size=[512, 512] if name == "resnet18" else [384, 384],
            train_micro_batch_size_per_gpu=2,
        )
    launch_ok(WORKER, 1, tmp_path / "found.json", *paths.values())
    found = json.loads((tmp_path / "found.json").read_text())
    for (name, option), path in paths.items():
        measured = found[path.stem]["peak"]
        predicted = count(resolve(load_run(path), 1, 100), 2).memory
        print(f"{name}, {option}: {predicted / 2**20:.0f} MiB, measured {measured / 2**20:.0f}")
        assert measured > 20 * 2**20
        assert predicted == pytest.approx(measured, rel=0.15), (name, option)


def test_plan_of_a_frozen_giant() -> None:
    """DINOv3's ViT-7B on 8 H200: weights, one gather of them, the forward pass's FLOPs, no activations."""
    recipe = REPO / "ds_configs/mask_rcnn_vitdet_dinov3_7b_64_adamw.json"
    changes = ["model.backbone.pretrained=false", "train_batch_size=16", "train_micro_batch_size_per_gpu=2"]
    frozen, trained = (
        make_plan(
            load_run(recipe, [*changes, f"model.backbone.frozen={f}"]), 8, MACHINES["h200"], 50e9, 0.4, 100
        )
        for f in ("true", "false")
    )
    backbone = sum(p.numel() for p in frozen.model.backbone.parameters())
    assert backbone > 6.7e9 and frozen.trainable == frozen.parameters - backbone == 99_610_352
    assert [choice.stage for choice in frozen.choices] == [0, 1, 2, 3], "nothing can be recomputed"
    assert frozen.own.stage == 3 and "frozen" in report(frozen) and "recomputed" not in report(frozen)
    held = frozen.states(3)
    assert held.weights == 2 * frozen.parameters / 8
    assert held.gradients + held.master + held.moments == (2 + 4 + 8) * frozen.trainable / 8
    assert frozen.own.communication == pytest.approx(
        7 / 8 * 2 * (backbone + 3 * frozen.trainable) / 50e9, rel=1e-6
    )
    mine, theirs = frozen.counts[0][0], trained.counts[0][0]
    assert mine.forward == theirs.forward > 55e12
    assert mine.backward < 0.02 * theirs.backward and mine.memory < 0.5 * theirs.memory
    assert frozen.fixed(3, False) + frozen.activations(0, 2) == frozen.own.memory < 10 * GIB


def test_report_of_a_giant() -> None:
    """EVA-g on 480 GPUs: what fits, what is fastest, and the same numbers computed by hand."""
    recipe = REPO / "ds_configs/mask_rcnn_vitdet_giant_960_agvm_adamw.json"
    run = load_run(recipe, ["model.backbone.pretrained=false"])
    plan = make_plan(run, 480, MACHINES["h200"], 50e9, 0.4, 117_266)
    trainable, share = plan.trainable, 1 / 480
    assert trainable == plan.parameters == 1_047_937_616
    stage_2 = states(trainable, trainable, 2, 2, 2, 480)
    assert stage_2 == (2 * trainable, 2 * trainable * share, 4 * trainable * share, 8 * trainable * share)
    one, two = plan.counts[0]
    assert one.forward == pytest.approx(9.924e12, rel=1e-3) and two.forward == 2 * one.forward
    assert one.backward == pytest.approx(2 * one.forward, rel=0.05)
    again = plan.counts[1][0]
    blocks = 40 * 12 * 1408 * 1408 * 4096 * 2  # matrix products of the blocks, without attention
    assert again.backward - one.backward > 0.8 * blocks
    assert again.memory < 0.7 * one.memory
    own = next(c for c in plan.choices if c.stage == 3 and c.every == 1)
    assert own is plan.own and own.fits(plan.machine)
    # Weights are gathered three times, gradients are scattered once; AGVM's two float32 rows every 10 steps.
    sent = 479 / 480 * trainable * (2 * 4 + 2 * 8 / 10)
    assert own.communication == pytest.approx(sent / 50e9)
    text = report(plan)
    assert "all            1,047,937,616   1,047,937,616" in text and "<- the recipe" in text
    best = plan.best()
    assert best is not None and best.stage == 2 and best.every == 0 and "Take ZeRO-2 with blocks kept" in text
    assert plan.run.giantdet.train.steps == 1344 and "1,344 steps:" in text


def test_traffic_of_agvm_inside_groups_of_batch_norms() -> None:
    """MegDet at 256 on 128 GPUs, batch norms over 32 images and so over 16 ranks, which are one shard."""
    change = ["model.backbone.pretrained=false", "agvm.estimator=all_splits", "agvm.interval=10"]
    recipe = REPO / "ds_configs/megdet_resnet50_256_sgd.json"

    def sent(*more: str) -> float:
        plan = make_plan(load_run(recipe, [*change, *more]), 128, MACHINES["h200"], 50e9, 0.4, 117_266)
        return plan.own.communication * 50e9 / plan.trainable

    without, with_sgd = sent(), sent("agvm.enabled=true")
    # One float32 value per parameter in each group, every 10 steps; norms of gradients need no more.
    assert with_sgd - without == pytest.approx(2 * 15 / 16 * 4 / 10, rel=1e-4)
    with_single = sent("agvm.enabled=true", "norm.bn_size=2") - sent("norm.bn_size=2")
    assert with_single == pytest.approx(0.0, abs=1e-6)


def test_models_that_do_not_fit() -> None:
    run = load_run(REPO / "ds_configs/mask_rcnn_resnet50_16_sgd.json", ["model.backbone.pretrained=false"])

    def plan(gpus: int, memory: float) -> Plan:
        return make_plan(run, gpus, Machine("small", memory, 300e12), 50e9, 0.4, 117_266)

    one = plan(1, 4.9e9)  # 3 GiB of it are reserved
    assert one.best() is None and "does not fit" in report(one)
    fewest = one.fewest_gpus()
    assert fewest is not None and fewest > 1 and f"fits on {fewest} or more" in report(one)
    hopeless = plan(2, 4e9)
    assert hopeless.fewest_gpus() is None and "No number of GPUs" in report(hopeless)
    with pytest.raises(ConfigError, match=r"3 GPUs: train_batch_size 16.*nearest possible"):
        plan(3, 80e9)
    with pytest.raises(ValueError, match="unknown GPU 'x1'; known are a100-40, a100"):
        machine_of("x1", None, None)
    assert machine_of("x1", 24.0, 100.0) == Machine("x1", 24e9, 100e12)


def test_offload_where_nothing_fits() -> None:
    run = load_run(
        REPO / "ds_configs/mask_rcnn_vitdet_giant_32_agvm_adamw.json",
        ["zero_optimization.stage=2", "model.backbone.pretrained=false"],
    )
    plan = make_plan(run, 2, Machine("small", 12e9, 300e12), 50e9, 0.4, 117_266)
    assert plan.best() is None
    found = plan.with_offload()
    assert found is not None and found.offload and found.fits(plan.machine)
    assert found.host == pytest.approx(12 * plan.parameters / 2)  # float32 weights, two moments
    assert "with offload_optimizer" in report(plan).replace("With", "with")


def test_recomputing_every_nth_block_is_in_between() -> None:
    change = ["model.backbone.checkpoint_blocks=3", "model.backbone.pretrained=false"]
    run = load_run(REPO / "ds_configs/mask_rcnn_vitdet_base_64_adamw.json", change)
    plan = make_plan(run, 64, MACHINES["h100"], 50e9, 0.4, 117_266)
    memory = [plan.activations(every, 1) for every in (0, 3, 1)]
    assert list(plan.counts) == [0, 3, 1] and memory == sorted(memory, reverse=True)
    assert "1 in 3 rec." in report(plan) and plan.own.every == 3


@pytest.mark.parametrize("largest_possible", [0, 1, 2, 3, 7, 8, 100])
def test_search_for_the_largest(largest_possible: int) -> None:
    tried: list[int] = []

    def fits(images: int) -> bool:
        tried.append(images)
        return images <= largest_possible

    assert largest(fits) == largest_possible
    assert len(tried) == len(set(tried)) <= 2 + 2 * largest_possible.bit_length()


def test_trial_steps_on_this_machine(tmp_path: Path) -> None:
    """Real steps in separate processes, one of which may not allocate what it needs."""
    path = write(tmp_path / "run.json", giantdet__data__size=[128, 128])
    tried = start(path, ["agvm.enabled=true"], 1, None, 2)
    assert tried.fits and 2**28 < tried.memory < 2**33
    assert not start(path, [], 1, 1e8, 64).fits
