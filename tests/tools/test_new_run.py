"""giantdet new: the values that follow from a data set, a size and a machine; its runs resolve and train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file
from tiny import MODEL, free_port, tiny_run

from giantdet import cli
from giantdet.config.load import load_run, parse_run
from giantdet.config.recipes import RECIPES, recipe_path
from giantdet.config.resolve import resolve
from giantdet.data.coco import CocoDataset
from giantdet.engine.metrics import read_metrics
from giantdet.errors import ConfigError, DataError
from giantdet.tools.canvas import canvas
from giantdet.tools.machines import MACHINES, Machine
from giantdet.tools.new_run import SIZES, Wishes, new_run

H100 = MACHINES["h100"]


def data_set(
    folder: Path,
    size: tuple[int, int] = (640, 480),
    side: int = 100,
    images: int = 3,
    masks: bool = True,
    objects: int = 1,
    name: str = "train",
) -> Path:
    """A COCO JSON of images of one size (width, height) with square objects; the files are there too."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records, annotations = [], []
    for n in range(1, images + 1):
        Image.new("RGB", size).save(folder / f"images/{name}{n}.jpg")
        records.append({"id": n, "file_name": f"{name}{n}.jpg", "width": size[0], "height": size[1]})
        for k in range(objects):
            record = {"image_id": n, "category_id": 1, "bbox": [5 + k % 9, 5, side, side], "iscrowd": 0}
            polygon = [5, 5, 5 + side, 5, 5 + side, 5 + side]
            record["segmentation"] = [polygon] if masks else []
            annotations.append(record | {"id": len(annotations) + 1, "area": side * side})
    info = {"images": str(folder / "images")}
    content = {"info": info, "images": records, "annotations": annotations}
    (folder / f"{name}.json").write_text(json.dumps(content | {"categories": [{"id": 1, "name": "cell"}]}))
    return folder / f"{name}.json"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A tiny recipe of 12 epochs at a batch of 16."""
    raw = tiny_run(
        tmp_path, tmp_path / "out", giantdet__data__size=[512, 512], giantdet__data__short_side=512
    )
    raw["giantdet"]["data"]["augment"] = {"short_sides": [256, 512]}
    raw["giantdet"]["train"] = {"epochs": 12}
    raw |= {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": "auto",
    }
    schedule = {"milestones": ["9 epochs", 10_000], "warmup_num_steps": 500}
    raw["scheduler"] = {"type": "WarmupMultiStepLR", "params": schedule}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(raw))
    return path


def made(data: Path, recipe: Path, **wishes: Any) -> dict[str, Any]:
    wishes = {"machine": H100, "size": str(recipe)} | wishes
    new = new_run(Wishes(data, **wishes))
    for path in new.why:  # each reason is that of a value in the JSON
        assert f"{path} = " in new.text()
    return new.raw


@pytest.mark.parametrize(
    "sizes, size, short, scale",
    [
        ([(480, 640)], [512, 640], 480, 1.0),
        ([(300, 400)], [320, 384], 288, 0.96),
        ([(400, 300)], [384, 320], 288, 0.96),
        ([(80, 100)], [256, 320], 256, 3.2),
        ([(3000, 4000)], [768, 1024], 768, 0.256),
        ([(300, 400), (400, 300)], [384, 384], 288, 0.96),
        ([(500, 500)] * 19 + [(300, 3000)], [512, 512], 512, 1.024),
        ([(1000, 8000)], [128, 1024], 128, 0.128),
    ],
)
def test_canvas(sizes: list[tuple[int, int]], size: list[int], short: int, scale: float) -> None:
    """Computed by hand, of sizes (height, width) and a recipe of 800 on 1024 x 1024."""
    found = canvas(np.array(sizes), most_short=800, most_long=1024)
    assert (found.size, found.short_side) == (size, short)
    assert found.scale == pytest.approx(scale)


def test_the_canvas_of_a_recipe_may_be_one_number(tmp_path: Path, recipe: Path) -> None:
    data = data_set(tmp_path / "data", (800, 600))
    expected = made(data, recipe)["giantdet"]["data"]
    raw = json.loads(recipe.read_text())
    raw["giantdet"]["data"]["size"] = 512
    recipe.write_text(json.dumps(raw))
    assert made(data, recipe)["giantdet"]["data"] == expected


@pytest.mark.parametrize("side, sizes", [(24, 16), (26, 32)])
def test_anchors_are_those_of_the_objects_on_the_canvas(
    tmp_path: Path, recipe: Path, side: int, sizes: int
) -> None:
    """25 pixels decide (docs/real-data.md); images of 512 x 512 are not scaled."""
    model = made(data_set(tmp_path / "data", (512, 512), side), recipe)["giantdet"]["model"]
    assert model["rpn"]["anchor_sizes"] == [sizes * 2**n for n in range(5)]


def test_data_without_masks_and_with_many_objects(tmp_path: Path, recipe: Path) -> None:
    raw = made(data_set(tmp_path / "data", masks=False, objects=130, images=1), recipe)
    assert raw["giantdet"]["model"]["mask_head"]["enabled"] is False
    assert raw["giantdet"]["data"]["max_objects"] == 200
    assert raw["giantdet"]["model"]["box_head"]["detections"] == 200
    assert raw["giantdet"]["eval"]["max_detections"] == 200
    few = made(data_set(tmp_path / "few"), recipe, side=300)["giantdet"]
    assert few["data"]["size"] == [192, 256] and few["data"]["short_side"] == 192
    assert "enabled" not in few["model"]["mask_head"] and "max_detections" not in few.get("eval", {})


def test_batch_length_and_lr(tmp_path: Path, recipe: Path) -> None:
    """Few images: a small batch, the LR's rule, at least 1000 steps, milestones and warmup in proportion."""
    raw = made(data_set(tmp_path / "data", images=3), recipe)
    assert raw["train_batch_size"] == raw["train_micro_batch_size_per_gpu"] == 4
    assert raw["giantdet"]["lr_scaling"] == {"reference_batch": 16, "rule": "sqrt"}  # AdamW
    assert raw["giantdet"]["train"]["epochs"] == 1334  # 1000 x 4 / 3
    assert raw["scheduler"]["params"]["milestones"] == [f"{9 * 1334 / 12:.4g} epochs", 10_000]
    assert raw["scheduler"]["params"]["warmup_num_steps"] == 100
    assert raw["giantdet"]["train"]["save_every"] == "133 epochs" and "val" not in raw["giantdet"]["data"]
    resolved = resolve(parse_run(raw), 1, 3)
    assert resolved.giantdet.train.steps == 1001
    many = made(data_set(tmp_path / "many", (64, 64), 40, images=500), recipe, gpus=2)
    assert many["train_batch_size"] == 16 and many["train_micro_batch_size_per_gpu"] == 8
    assert "lr_scaling" not in many["giantdet"] and many["giantdet"]["train"]["epochs"] == 32
    assert "photometric" in many["giantdet"]["data"]["augment"]


def test_validation_data(tmp_path: Path, recipe: Path) -> None:
    train = data_set(tmp_path / "data")
    beside = data_set(tmp_path / "data", name="val")
    other = data_set(tmp_path / "other", name="test")
    raw = made(train, recipe)["giantdet"]
    assert raw["data"]["val"]["annotations"] == str(beside) and raw["train"]["eval_every"] == "133 epochs"
    raw = made(train, recipe, val=other)["giantdet"]
    assert raw["data"]["val"]["images"] == str(tmp_path / "other/images")
    content = json.loads(other.read_text())
    content["categories"].append({"id": 2, "name": "dog"})
    other.write_text(json.dumps(content))
    with pytest.raises(DataError, match="the class 'dog' is not among those of"):
        made(train, recipe, val=other)


def test_what_cannot_be(tmp_path: Path, recipe: Path) -> None:
    data = data_set(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"does not fit on 1 x toy: an image needs .* or a smaller --size"):
        made(data, recipe, machine=Machine("toy", 1e8, 1e12))
    with pytest.raises(ConfigError, match=r"smal: no such recipe.*giantdet configs"):
        made(data, recipe, size="smal")
    with pytest.raises(ConfigError, match="semantic_fpn is not a model of objects alone"):
        made(data, recipe, size="semantic_fpn_resnet50_32_agvm_sgd")
    content = json.loads(data.read_text())
    del content["info"]
    data.write_text(json.dumps(content))
    with pytest.raises(DataError, match="does not tell where its images are"):
        made(data, recipe)
    assert made(data, recipe, images=tmp_path / "data/images")
    content["annotations"] = []
    data.write_text(json.dumps(content))
    with pytest.raises(DataError, match="there is nothing to train on"):
        made(data, recipe, images=tmp_path / "data/images")


@pytest.mark.parametrize("size", SIZES)
def test_each_size_resolves(tmp_path: Path, size: str) -> None:
    data = data_set(tmp_path / "data", (256, 256), 20)
    output = tmp_path / "run.json"
    arguments = ["new", str(output), "--data", str(data), "--size", size, "--gpus", "2", "--gpu", "h100"]
    assert cli.main(arguments) == 0
    run = load_run(output)
    dataset = CocoDataset(data, tmp_path / "data/images")
    resolved = resolve(run, 2, len(dataset), dataset.classes)
    assert resolved.batch.total == 4 and resolved.giantdet.model.backbone.pretrained
    assert isinstance(run.about, dict) and "train.epochs" in run.about["why"]
    assert cli.main(arguments) == 2  # it exists


def test_a_new_run_trains(tmp_path: Path, demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command to two steps and an evaluation, with weights in a local file."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "RANK": "0"}
    for name, value in (group | {"LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model(MODEL["backbone"]["name"]).state_dict(), weights)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(tiny_run(demo_data, tmp_path / "out")))
    output = tmp_path / "mine.json"
    for name in ("train", "val"):  # as import-data writes them
        content = json.loads((demo_data / f"{name}.json").read_text())
        content["info"] = {"images": str(demo_data / name)}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    arguments = ["new", str(output), "--data", str(tmp_path / "train.json")]
    arguments += ["--size", str(recipe), "--weights", str(weights), "--gpu", "cpu"]
    assert cli.main(arguments) == 0
    raw = json.loads(output.read_text())
    assert raw["giantdet"]["train"]["output"] == "runs/mine"
    assert raw["giantdet"]["data"]["val"]["images"] == str(demo_data / "val")
    overrides = ["train.steps=2", f"train.output={tmp_path / 'run'}", "train.log_every=1"]
    assert cli.main(["train", "--config", str(output), *overrides]) == 0
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert (tmp_path / "run/export/model.safetensors").is_file()


def test_recipes_are_in_the_package() -> None:
    """The package's folder is that of the checkout, so a wheel has the same files."""
    assert RECIPES.samefile(Path(cli.__file__).parents[1] / "ds_configs")
    assert recipe_path("demo").name == "demo.json"
    with pytest.raises(ConfigError, match="did you mean demo"):
        recipe_path("dmo")
