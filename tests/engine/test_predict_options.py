"""Options of prediction: batches, devices, results without overlays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MODELS

from giantdet import cli, load_predictor
from giantdet.architectures import build_model
from giantdet.config.architectures.common import ArchitectureConfig, NormConfig
from giantdet.config.architectures.panoptic_fpn import PanopticFpnConfig
from giantdet.config.architectures.semantic_fpn import SemanticFpnConfig
from giantdet.engine.predict import Predictor
from giantdet.errors import InputError
from giantdet.export import ExportConfig

PIXELS = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_options_of_predict(tiny_export: Path, tmp_path: Path, capsys: Any) -> None:
    """Batches, no overlays, a device: the results equal those of single images."""
    for number in range(5):
        Image.fromarray(np.roll(PIXELS, 7 * number, 1)).save(tmp_path / f"{number}.png")
    (tmp_path / "2b.png").write_bytes(b"no picture")
    arguments = ["predict", str(tiny_export), str(tmp_path), "--threshold", "0", "--device", "cpu"]
    found = []
    for name, more in (("one", []), ("two", ["--batch-size", "2", "--no-overlays"])):
        assert cli.main([*arguments, "--output", str(tmp_path / name), *more]) == 2, "one is not an image"
        assert capsys.readouterr().out.count(" objects") == 5
        records = json.loads((tmp_path / name / "results.json").read_text())
        found.append(sorted((r["file_name"], round(r["score"], 4), r["category_id"]) for r in records))
        assert len(list((tmp_path / name).glob("*.png"))) == (5 if name == "one" else 0)
        for file in (tmp_path / name).glob("*.png"):
            file.unlink()  # otherwise it would be an input of the next run
    assert found[0] == found[1]
    for device, words in (("gpu", "no such device"), ("cuda:99", "GPUs on this machine")):
        assert cli.main([*arguments[:-1], device, "--output", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err


def test_batches_give_the_same_results(tiny_export: Path) -> None:
    """Images of several sizes, and tiles; sums in a batch may round differently."""
    predictor = load_predictor(tiny_export, "cpu")
    images = [PIXELS, PIXELS[:40, :30], PIXELS[::-1].copy()]
    for one, many in zip(predictor(images, 0.0), predictor(images, 0.0, batch_size=2), strict=True):
        assert one.size_hw == many.size_hw and one.names == many.names
        torch.testing.assert_close(one.boxes_D4, many.boxes_D4, atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="batch_size"):
        predictor(images, batch_size=0)
    text = repr(predictor)
    assert "mask_rcnn on cpu: 4 classes, canvas 64 x 64" in text and "threshold=0.5" in text


@pytest.mark.parametrize("kind", ["semantic_fpn", "panoptic_fpn"])
def test_maps_in_batches_are_the_same_and_have_no_tiles(kind: str) -> None:
    """Each image in a batch gets the windows of its own."""
    is_panoptic = kind == "panoptic_fpn"
    raw, names = {**MODELS[kind], "num_classes": 3}, tuple((number, str(number)) for number in range(4))
    section: ArchitectureConfig = (
        PanopticFpnConfig.model_validate({**raw, "num_stuff_classes": 4})
        if is_panoptic
        else SemanticFpnConfig.model_validate(raw)
    )
    config = ExportConfig(
        model=section,
        norm=NormConfig(type="local"),
        size=(64, 64),
        short_side=64,
        window_stride=None if is_panoptic else 40,
        categories=names[:3] if is_panoptic else (),
        semantic_categories=names if is_panoptic else names[:3],
    )
    torch.manual_seed(0)
    predictor = Predictor(build_model(section, (64, 64), config.norm).eval(), config)
    images = [PIXELS, np.concatenate([PIXELS] * 3, 1), PIXELS[:, ::-1].copy()]
    ones = [predictor(image) for image in images]
    for one, many in zip(ones, predictor(images, batch_size=3), strict=True):
        assert one.semantic_HW is not None and many.semantic_HW is not None
        assert one.semantic_HW.shape == many.semantic_HW.shape == one.size_hw
        assert (one.semantic_HW != many.semantic_HW).float().mean() < 1e-3
        assert (one.panoptic is None) == (many.panoptic is None) == (not is_panoptic)
    with pytest.raises(InputError, match="only objects"):
        predictor(PIXELS, tile=64)
