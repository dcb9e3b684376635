"""Exports without the weights of a frozen backbone: written by real runs, and completed when loaded."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import REPO, launch_ok, tiny_run

from giantdet.architectures import build_model
from giantdet.cli import main
from giantdet.config.classes import Classes
from giantdet.config.load import parse_run
from giantdet.config.resolve import resolve
from giantdet.engine.train import prepare
from giantdet.errors import ConfigError, InputError
from giantdet.export import export_config, load_detector, load_weights, read_export_config
from giantdet.layers.deferred import LARGE

TRAIN = REPO / "tests/distributed/worker_train.py"
NAME = "test_resnet.r160_in1k"
WIDE = {"channels": [32, 48, 48, 160]}  # so that one weight is allocated late at ZeRO-3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Path:
    """Runs on two ranks at ZeRO-3 in bf16: `whole` exports all weights, `light` leaves the backbone out.

    `next` starts from the export of `light`, with settings that have no effect. weights.safetensors has the
    backbone's own weights, and out.txt the output of the main rank.
    """
    folder = tmp_path_factory.mktemp("frozen_exports")
    torch.manual_seed(3)
    body = timm.create_model("test_resnet", **WIDE)
    assert max(p.numel() for p in body.parameters()) > LARGE
    save_file(body.state_dict(), folder / "weights.safetensors")
    files = []
    for name in ("whole", "light", "next"):
        raw = tiny_run(
            demo_data,
            folder / name,
            zero_optimization__stage=3,
            bf16={"enabled": True},
            giantdet__ema={"enabled": True, "decay": 0.5},
            giantdet__model__backbone={
                "name": "test_resnet",
                "frozen": True,
                "timm_args": WIDE,
                "init_weights": str(folder / "weights.safetensors"),
            },
            giantdet__train__export_backbone=name != "light",
        )
        if name == "light":
            raw["giantdet"]["model"]["backbone"] |= {"drop_path_rate": 0.2, "checkpoint_blocks": True}
            raw["giantdet"]["param_groups"] = {"layer_decay": 0.5}
        if name == "next":
            raw["giantdet"]["model"]["init_weights"] = str(folder / "light/export")
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(raw))
    (folder / "out.txt").write_text(launch_ok(TRAIN, 2, *files)[0].out)
    return folder


@pytest.fixture
def light(runs: Path, tmp_path: Path) -> Path:
    """A copy of the export without its backbone."""
    return shutil.copytree(runs / "light/export", tmp_path / "light")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_a_run_reports_what_is_frozen(runs: Path) -> None:
    lines = [
        line for line in (runs / "out.txt").read_text().splitlines() if line.startswith("backbone frozen: ")
    ]
    count = sum(load_file(runs / "whole/export/model.safetensors")[key].numel() for key in trained_by_timm())
    whole = (
        f"backbone frozen: {count:,} parameters in evaluation mode, without gradients and optimizer states"
    )
    idle = "backbone.drop_path_rate, backbone.checkpoint_blocks, param_groups.layer_decay"
    assert lines == [whole, f"{whole}; without effect: {idle}", whole]


def trained_by_timm() -> list[str]:
    """Names of convolutions: batch norms are constant, and the classifier is not part of the backbone."""
    named = timm.create_model("test_resnet", **WIDE).named_parameters()
    return [f"backbone.body.{name}" for name, p in named if p.ndim == 4]


def test_only_the_body_is_left_out(runs: Path) -> None:
    whole, light = (load_file(runs / name / "export/model.safetensors") for name in ("whole", "light"))
    body = {key for key in whole if key.startswith("backbone.body.")}
    assert len(body) > 50 and whole.keys() - body == light.keys()
    assert_equal({key: whole[key] for key in light}, light)
    left = read_export_config(runs / "light/export").left_out
    assert left is not None and (left.kind, left.source, left.precision) == (
        "file",
        "weights.safetensors",
        "bf16",
    )
    assert read_export_config(runs / "whole/export").left_out is None


@pytest.mark.parametrize("way", ["argument", "link"])
def test_completed_from_a_file_equals_the_whole_export(
    runs: Path, light: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = runs / "weights.safetensors" if way == "argument" else None
    if way == "link":
        (light / "backbone.safetensors").symlink_to(runs / "weights.safetensors")
    with caplog.at_level(logging.WARNING, "giantdet"):
        detector, _ = load_detector(light, backbone=given)
    (line,) = caplog.messages
    assert line.startswith(f"{light} leaves out its frozen backbone, weights.safetensors: filled in from ")
    assert_equal(detector.state_dict(), load_detector(runs / "whole/export")[0].state_dict())


def test_missing_or_wrong_weights_give_one_line(runs: Path, light: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"read from weights.safetensors: put that file .* as backbone\.safe"
    ):
        load_detector(light)
    other = {k: t * 1.01 if t.ndim == 4 else t for k, t in load_file(runs / "weights.safetensors").items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="trained with other weights of its frozen backbone than these"):
        load_detector(light, backbone=tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds its backbone: leave out x"):
        load_detector(runs / "whole/export", backbone="x")


def test_export_of_a_checkpoint_equals_the_runs(runs: Path, tmp_path: Path) -> None:
    """Files that users keep beside an export are not removed."""
    (tmp_path / "backbone.safetensors").symlink_to(runs / "weights.safetensors")
    assert main(["export", str(runs / "light"), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "backbone.safetensors").exists()
    again, first = (load_file(path / "model.safetensors") for path in (tmp_path, runs / "light/export"))
    assert_equal(again, first)
    mine, theirs = (read_export_config(path).left_out for path in (tmp_path, runs / "light/export"))
    assert mine is not None and theirs is not None
    assert mine.magnitude == pytest.approx(theirs.magnitude, rel=1e-12) and mine.magnitude > 100
    load_detector(tmp_path)


def test_a_run_starts_from_such_an_export(runs: Path) -> None:
    """At ZeRO-3, where large weights are allocated late, the export of `next` has the same backbone."""
    whole, started = (load_file(runs / name / "export/model.safetensors") for name in ("whole", "next"))
    assert_equal(*({k: t for k, t in e.items() if k.startswith("backbone.")} for e in (whole, started)))
    assert any(not torch.equal(whole[key], started[key]) for key in whole)


def offline(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make timm load the weights of every tag from a file."""
    create = timm.create_model

    def create_offline(name: str, **options: Any) -> torch.nn.Module:
        return create(name, **options, pretrained_cfg_overlay={"file": str(file)})

    monkeypatch.setattr(timm, "create_model", create_offline)


def test_by_timms_tag(
    runs: Path, light: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((light / "config.json").read_text())
    config["left_out"] |= {"kind": "tag", "source": NAME}
    config["model"]["backbone"]["name"] = NAME
    (light / "config.json").write_text(json.dumps(config))
    offline(runs / "weights.safetensors", monkeypatch)
    with caplog.at_level(logging.WARNING, "giantdet"):
        detector, exported = load_detector(light)
    assert caplog.messages[-1].endswith(f"{NAME}: filled in from timm's weights of {NAME}")
    expected = load_detector(runs / "whole/export")[0].state_dict()
    assert_equal(detector.state_dict(), expected)
    # As initial weights of a run whose backbone has no weights of its own.
    model = build_model(exported.model, exported.size, exported.norm)
    load_weights(model, exported.model.model_copy(update={"init_weights": str(light)}))
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-2, atol=1e-2, msg=key)
    unnamed = exported.model.backbone.model_copy(update={"name": "test_vit"})
    with pytest.raises(InputError, match=f"set giantdet.model.backbone.name to {NAME}"):
        load_weights(
            model, exported.model.model_copy(update={"init_weights": str(light), "backbone": unnamed})
        )


def test_the_full_tag_is_written(demo_data: Path, tmp_path: Path) -> None:
    raw = tiny_run(demo_data, tmp_path, giantdet__train__export_backbone=False)
    raw["giantdet"]["model"] = raw["giantdet"]["model"] | {
        "backbone": {"name": "test_resnet", "frozen": True, "pretrained": True},
        "num_classes": 4,
    }
    described = export_config(resolve(parse_run(raw), 1, 12), Classes.numbered(4))
    assert described.left_out is not None and described.left_out.source == NAME
    assert described.left_out.kind == "tag" and described.left_out.precision == "fp32"
    assert described.model.backbone.name == NAME


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"backbone": {"pretrained": True}}, "set giantdet.model.backbone.frozen"),
        ({"backbone": {"frozen": True}}, "needs weights that can be loaded again"),
        (
            {"backbone": {"frozen": True, "pretrained": True}, "init_weights": "x"},
            "and not giantdet.model.init",
        ),
    ],
)
def test_exports_that_cannot_be_completed_are_refused(model: dict[str, Any], message: str) -> None:
    raw = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "train_batch_size": 2}
    block = {"model": model, "train": {"steps": 1, "export_backbone": False}}
    with pytest.raises(ConfigError, match=message):
        prepare(parse_run(raw | {"giantdet": block}))
