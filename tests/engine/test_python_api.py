"""What a predictor takes and returns in Python: sources, half precision, supervision, pictures."""

from __future__ import annotations

import builtins
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision
import torch
from PIL import Image
from pycocotools import mask as mask_util
from tiny import MODELS, tiny_run

from giantdet import cli, load_predictor
from giantdet.architectures import build_model
from giantdet.config.architectures import SECTIONS
from giantdet.config.architectures.common import NormConfig
from giantdet.engine.draw import draw
from giantdet.engine.predict import Predictor
from giantdet.export import ExportConfig
from giantdet.layers.precision import cast

PIXELS = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture
def run_folder(tiny_export: Path, tmp_path: Path) -> Path:
    """A run as training leaves it: its own config.json, and the export in a folder."""
    run = tmp_path / "run"
    shutil.copytree(tiny_export, run / "export")
    (run / "config.json").write_text('{"giantdet": {}}')
    (run / "metrics.jsonl").write_text("")
    return run


def test_a_run_stands_for_its_export(
    run_folder: Path, tiny_export: Path, tmp_path: Path, capsys: Any
) -> None:
    ours, theirs = load_predictor(run_folder, "cpu"), load_predictor(tiny_export, "cpu")
    assert torch.equal(ours(PIXELS, 0.0).boxes_D4, theirs(PIXELS, 0.0).boxes_D4)
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    arguments = ["predict", str(run_folder), str(tmp_path / "a.png"), f"--output={tmp_path / 'out'}"]
    assert cli.main(arguments) == 0
    assert (tmp_path / "out/a.png").is_file()
    shutil.rmtree(run_folder / "export")
    assert cli.main(arguments) == 2
    assert f"has no export yet; write one with: giantdet export {run_folder}" in capsys.readouterr().err


def test_a_run_is_scored_on_its_own_validation_set(run_folder: Path, demo_data: Path, capsys: Any) -> None:
    """`eval RUN` and `eval RUN/export` without data print what they print with --annotations and --images."""
    tables = []
    raw = tiny_run(demo_data, run_folder) | {"train_batch_size": 2}
    (run_folder / "config.json").write_text(json.dumps(raw))
    data = ["--annotations", str(demo_data / "val.json"), "--images", str(demo_data / "val")]
    for arguments in ([str(run_folder)], [str(run_folder / "export")], [str(run_folder), *data]):
        assert cli.main(["eval", *arguments, "--workers", "0"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] == tables[2] and "AP50" in tables[0]
    shutil.move(run_folder / "export", run_folder.parent / "alone")
    assert cli.main(["eval", str(run_folder.parent / "alone")]) == 2
    assert "eval: give --annotations and --images" in capsys.readouterr().err


def test_supervision_has_the_same_detections(tiny_export: Path) -> None:
    found = load_predictor(tiny_export, "cpu")(PIXELS, threshold=0.0)
    detections = found.to_supervision()
    assert isinstance(detections, supervision.Detections) and len(detections) == len(found.names) > 0
    assert detections.xyxy.tolist() == found.boxes_D4.tolist()
    assert detections.confidence.tolist() == found.scores_D.tolist()
    assert detections["class_name"].tolist() == found.names
    for d, mask in enumerate(detections.mask):
        assert (mask == mask_util.decode(found.rles_D[d])).all()
    without = found._replace(rles_D=None).to_supervision()
    assert without.mask is None
    annotated = supervision.MaskAnnotator().annotate(PIXELS.copy(), detections)
    assert annotated.shape == PIXELS.shape


def test_no_objects_in_supervision(tiny_export: Path) -> None:
    found = load_predictor(tiny_export, "cpu")(PIXELS, threshold=1.0)
    assert len(found.to_supervision()) == 0


def test_without_supervision_the_command_is_named(tiny_export: Path, monkeypatch: Any) -> None:
    found = load_predictor(tiny_export, "cpu")(PIXELS, threshold=0.0)
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "supervision":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'pip install "giantdet\[supervision\]"'):
        found.to_supervision()


def test_results_draw_themselves_on_the_image_given(tiny_export: Path, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    file = io.BytesIO((tmp_path / "a.png").read_bytes())
    predictor = load_predictor(tiny_export, "cpu")
    expected = None
    for image in (PIXELS, tmp_path / "a.png", file, Image.fromarray(PIXELS), torch.from_numpy(PIXELS)):
        found = predictor([image, image], 0.0)[1] if image is not file else predictor(image, 0.0)
        picture = np.asarray(found.plot())
        expected = np.asarray(draw(PIXELS, found)) if expected is None else expected
        assert (picture == expected).all()
    found.save(tmp_path / "picture.png")
    assert (np.asarray(Image.open(tmp_path / "picture.png")) == expected).all()
    assert (np.asarray(found.plot(255 - PIXELS)) != expected).any()
    with pytest.raises(ValueError, match="no image to draw on"):
        found._replace(image=None).plot()


def test_results_say_what_they_are(tiny_export: Path) -> None:
    found = load_predictor(tiny_export, "cpu")(PIXELS, 0.0)
    name = found.names[0]
    assert repr(found).startswith(f"<Found: {len(found.names)} objects (")
    assert f"{found.names.count(name)} {name}" in repr(found) and "64 x 48 pixels" in repr(found)


@pytest.mark.parametrize("kind", MODELS)
def test_half_precision_finds_the_same(kind: str) -> None:
    """The tiny models of each architecture; bf16 has 8 bits, so that boxes move by a part of a pixel."""
    section = SECTIONS[kind].model_validate(MODELS[kind])
    section = section.model_copy(update=dict.fromkeys(section.class_keys, 4))
    config = ExportConfig(
        model=section,
        norm=NormConfig(type="local"),
        size=(64, 64),
        short_side=64,
        categories=tuple((n, str(n)) for n in range(4)),
        semantic_categories=tuple((n, str(n)) for n in range(5)),
    )
    torch.manual_seed(0)
    model = build_model(config.model, config.size, config.norm).eval()
    whole = Predictor(model, config)(PIXELS, 0.0)
    for dtype in (torch.bfloat16, torch.float16):
        cast(model, dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        half = Predictor(model, config)(PIXELS, 0.0)
        assert half.scores_D.dtype == torch.float32 and half.boxes_D4.dtype == torch.float32
        if len(whole.scores_D):
            assert (half.scores_D[:3] - whole.scores_D[:3]).abs().max() < 0.03
        if whole.semantic_HW is not None and half.semantic_HW is not None:
            assert (whole.semantic_HW == half.semantic_HW).float().mean() > 0.9


def test_dtypes_of_load_predictor(tiny_export: Path) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        predictor = load_predictor(tiny_export, "cpu", dtype=dtype)
        assert {p.dtype for p in predictor.detector.parameters()} == {torch.bfloat16}
        assert len(predictor(PIXELS, 0.0).names) > 0
    with pytest.raises(ValueError, match="give one of float32, bfloat16, float16"):
        load_predictor(tiny_export, "cpu", dtype=torch.int8)
