"""The images of `giantdet predict`, and the inputs of the predictor in Python."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from giantdet import cli, load_predictor
from giantdet.data.images import limit_pixels
from giantdet.engine import fonts
from giantdet.engine.found import Found
from giantdet.engine.inputs import image_files, picture_names
from giantdet.engine.predict import load_image

PIXELS = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
PIXELS[0, 0], PIXELS[0, 1] = 0, 255


def same(one: Found, other: Found) -> bool:
    return one.to_coco(1) == other.to_coco(1) and len(one.names) > 0


def test_the_predictor_accepts_a_picture_in_every_form(tiny_export: Path, tmp_path: Path) -> None:
    predictor = load_predictor(tiny_export, "cpu")
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    wanted = predictor(tmp_path / "a.png", threshold=0.0)
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    with (tmp_path / "a.png").open("rb") as file:
        forms: list[Any] = [
            str(tmp_path / "a.png"),
            file,
            PIXELS,
            PIXELS.astype(np.float32) / 255,
            PIXELS.astype(np.uint16) * 257,
            Image.fromarray(PIXELS),
            tensor,
            tensor / 255,
        ]
        assert all(same(predictor(form, threshold=0.0), wanted) for form in forms)
    for batch in ([PIXELS, tensor], (tmp_path / "a.png", PIXELS), tensor[None].repeat(2, 1, 1, 1)):
        found = predictor(batch, threshold=0.0)
        assert len(found) == 2 and all(same(one, wanted) for one in found)
    assert predictor([]) == []
    for wrong, words in (
        ([[PIXELS]], "give a flat list"),
        ([PIXELS, None], "NoneType"),
        (tensor - 3.0, "values"),
    ):
        with pytest.raises(ValueError, match=words):
            predictor(wrong)


def test_masks_without_detections(tiny_export: Path) -> None:
    predictor = load_predictor(tiny_export, "cpu")
    found = predictor(PIXELS, threshold=0.0)
    assert found.masks_DHW is not None and found.masks_DHW.shape == (len(found.names), 48, 64)
    nothing = predictor(PIXELS, threshold=1.0)
    assert nothing.masks_DHW is not None and nothing.masks_DHW.shape == (0, 48, 64)


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Pictures of many formats in sub-folders, two of the same name, and other files."""
    names = ("a.gif", "b.jfif", "c.bmp", "cam1/0.PNG", "cam2/0.png", "cam2/deep/d.webp")
    for name in names:
        path = tmp_path / "shots" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(path, "JPEG" if name.endswith("jfif") else None)
    (tmp_path / "shots/clip.mp4").write_bytes(b"no picture")
    (tmp_path / "shots/cam1/loop").symlink_to(tmp_path / "shots")
    return tmp_path / "shots"


def test_folders_give_all_formats_and_sub_folders(shots: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        files = image_files([shots])
    names = [str(path.relative_to(shots)) for path in files]
    assert names == ["a.gif", "b.jfif", "c.bmp", "cam1/0.PNG", "cam2/0.png", "cam2/deep/d.webp"]
    assert "1 files are not read as images: 1 .mp4" in caplog.text
    pictures = picture_names(files, shots.parent / "out")
    assert [p.name for p in pictures] == ["a.png", "b.png", "c.png", "0.png", "0_2.png", "d.png"]


def test_overlays_of_an_earlier_run_are_not_inputs(shots: Path, tiny_export: Path, capsys: Any) -> None:
    arguments = ["predict", str(tiny_export), str(shots), "--output", str(shots / "predictions")]
    assert cli.main(arguments) == 0 == cli.main(arguments)
    assert len(list((shots / "predictions").glob("*.png"))) == 6
    assert capsys.readouterr().out.count("cam2/0.png: ") == 2


def test_a_list_of_images_gives_its_ids(shots: Path, tiny_export: Path, tmp_path: Path, capsys: Any) -> None:
    records = [
        {"id": 901, "file_name": "cam2/0.png", "width": 64, "height": 48},
        {"id": 17, "file_name": "a.gif", "width": 64, "height": 48},
        {"id": 18, "file_name": "missing.png", "width": 64, "height": 48},
        {"id": 17, "file_name": "b.jfif", "width": 64, "height": 48},
    ]
    (tmp_path / "list.json").write_text(json.dumps({"images": records}))
    arguments = ["predict", str(tiny_export), str(shots), "--annotations", str(tmp_path / "list.json")]
    assert cli.main([*arguments, "--output", str(tmp_path / "out"), "--threshold", "0"]) == 2
    assert "1 of 3 images are left out, the first: " in capsys.readouterr().err
    results = json.loads((tmp_path / "out/results.json").read_text())
    ids = {(result["image_id"], Path(result["file_name"]).name) for result in results}
    assert ids == {(901, "0.png"), (17, "a.gif")}


def test_animations_are_reported(tmp_path: Path, caplog: Any) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (200, 10)]
    for name in ("a.gif", "b.webp", "c.tif", "d.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        with caplog.at_level(logging.WARNING, logger="giantdet"):
            assert (load_image(tmp_path / name) == 200).all(), "the first frame"
        assert f"{name} has several frames, only the first is read" in caplog.text
    caplog.clear()
    frames[0].save(tmp_path / "e.png")
    load_image(tmp_path / "e.png")
    assert not caplog.records


def test_the_pixel_limit_can_be_changed(tmp_path: Path, tiny_export: Path, capsys: Any) -> None:
    default = Image.MAX_IMAGE_PIXELS
    assert default is not None
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    arguments = ["predict", str(tiny_export), str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    try:
        assert cli.main([*arguments, "--max-image-pixels", "3000"]) == 2
        assert "raise data.max_image_pixels" in capsys.readouterr().err
        assert cli.main([*arguments, "--max-image-pixels", "3072"]) == 0, "48 x 64"
    finally:
        limit_pixels(2 * default)
    assert default == Image.MAX_IMAGE_PIXELS


def test_a_tilde_is_the_home_folder(tmp_path: Path, tiny_export: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert cli.main(["predict", str(tiny_export), "~/a.png", "--output=~/out"]) == 0
    assert (tmp_path / "out/a.png").is_file() and not (tmp_path / "~").exists()
    assert load_image("~/a.png").shape == (48, 64, 3)


def test_characters_missing_in_all_fonts_are_numbers_and_reported_once(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(fonts, "_system_fonts", lambda: ())
    monkeypatch.setattr(fonts, "_warned", False)
    fonts._font_of.cache_clear()
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        assert fonts.written("猫 cat", 12).text == "\\u732b cat"
        assert fonts.written("犬", 12).text == "\\u72ac"
        assert fonts.written("a\nb", 12).text == "a\\nb"
    fonts._font_of.cache_clear()
    assert caplog.text.count("no font of this system has the characters") == 1


def test_a_system_font_with_the_characters_is_used(monkeypatch: Any) -> None:
    default = fonts._default()
    monkeypatch.setattr(fonts, "_system_fonts", lambda: ("no such file", default))
    monkeypatch.setattr(fonts, "_default", lambda: fonts.__file__)  # a file without any characters
    fonts._font_of.cache_clear()
    text, font = fonts.written("кошка", 12)
    fonts._font_of.cache_clear()
    assert text == "кошка" and str(font.path).endswith("DejaVuSans.ttf")
