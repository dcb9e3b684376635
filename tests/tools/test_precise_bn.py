"""Precise BN against the statistics of all inputs at once, over two ranks, and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import launch_ok, tiny_run
from torch import nn

from giantdet import cli
from giantdet.config.classes import Classes
from giantdet.config.load import parse_run
from giantdet.config.resolve import resolve
from giantdet.layers.cgbn import convert_batchnorm
from giantdet.tools.precise_bn import bn_images, reestimate

WORKER = Path(__file__).resolve().parents[1] / "distributed/worker_train.py"


def test_statistics_equal_those_of_all_batches_at_once() -> None:
    torch.manual_seed(0)
    model = convert_batchnorm(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), None)
    batches = [torch.randn(n, 3, 9, 7) * n + 100 for n in (1, 4, 2)]
    assert reestimate(model, batches, 3, "cpu") == 1  # type: ignore[arg-type]
    with torch.no_grad():
        values = torch.cat([model[0](batch) for batch in batches]).double()
    torch.testing.assert_close(model[1].running_mean.double(), values.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(model[1].running_var.double(), values.var((0, 2, 3)), rtol=1e-5, atol=0)


def test_evaluation_equals_training_on_the_batch_of_the_estimate() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4)]
    model = convert_batchnorm(nn.Sequential(*layers), None)
    batch = torch.randn(6, 3, 40, 40)
    reestimate(model, [batch], 1, "cpu")  # type: ignore[list-item]
    expected = model.train()(batch)
    reestimate(model, [batch], 1, "cpu")  # type: ignore[list-item]
    # The running variance is unbiased, 1 + 1 / 8663 times the batch's.
    torch.testing.assert_close(model.eval()(batch), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [({"type": "cgbn", "bn_size": 4}, 4), ({"type": "cgbn"}, 8), ({"type": "local"}, 2), ({}, 2)],
)
def test_images_of_a_batch_norm(tmp_path: Path, norm: dict[str, object], expected: int) -> None:
    raw = tiny_run(tmp_path, tmp_path, gradient_accumulation_steps=3, giantdet__norm=norm)
    assert (
        bn_images(resolve(parse_run(raw), world_size=4, train_images=12, classes=Classes.numbered(4)))
        == expected
    )


def test_command(demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run on two ranks with CGBN; weights stay the same, statistics move towards those of the data."""
    norm = {"type": "cgbn", "bn_size": 4}
    raw = tiny_run(demo_data, tmp_path / "run", gradient_accumulation_steps=2, giantdet__norm=norm)
    (tmp_path / "run.json").write_text(json.dumps(raw))
    _, out, _ = launch_ok(WORKER, 2, tmp_path / "run.json")[0]
    assert "over 4 images (2 ranks x 2)" in out and "accumulation does not enlarge" in out
    assert cli.main(["precise-bn", str(tmp_path / "run"), "--batches", "5"]) == 0
    assert "over 20 images, 4 at a time" in capsys.readouterr().out
    before = load_file(tmp_path / "run/export/model.safetensors")
    after = load_file(tmp_path / "run/export_precise_bn/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == ("running" not in name and "tracked" not in name), name


def test_nothing_to_estimate(demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    raw = tiny_run(
        demo_data,
        tmp_path / "run",
        giantdet__norm={"type": "frozen"},
        giantdet__model__backbone__init_weights=str(tmp_path / "weights.safetensors"),
    )
    (tmp_path / "run.json").write_text(json.dumps(raw))
    launch_ok(WORKER, 1, tmp_path / "run.json")
    assert cli.main(["precise-bn", str(tmp_path / "run"), "--batches", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
