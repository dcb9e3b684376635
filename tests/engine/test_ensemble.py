"""Ensembles against a brute force over the members' own results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util
from safetensors.torch import load_file, save_file
from tiny import edit_json
from torchvision.ops import batched_nms, box_iou

from giantdet import cli
from giantdet.data.demo import CATEGORIES, make_demo
from giantdet.engine.ensemble import Member, fuse_members, matched, mean_mask, read_member
from giantdet.errors import InputError

SIZES = {1: (40, 60), 2: (30, 30)}


def rle(mask: np.ndarray) -> dict[str, Any]:
    found = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(found["size"]), "counts": found["counts"].decode("ascii")}


def members(seed: int = 0) -> list[Member]:
    """Three members that see the same objects with noise; the last has no masks and lacks class 3."""
    rng = np.random.default_rng(seed)
    found: list[list[dict[str, Any]]] = [[], [], []]
    for image, (height, width) in SIZES.items():
        for _ in range(8):
            category = int(rng.integers(1, 4))
            corner, sides = rng.uniform(0, 15, 2), rng.uniform(8, 14, 2)
            for m in range(3):
                if rng.random() < 0.25 or (m == 2 and category == 3):
                    continue
                x, y = np.maximum(corner + rng.normal(0, 0.8, 2), 0)
                w, h = sides + rng.normal(0, 0.8, 2)
                record: dict[str, Any] = {
                    "image_id": image,
                    "category_id": category,
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "score": float(rng.uniform(0.1, 0.9)),
                }
                if m < 2:
                    mask = np.zeros((height, width), bool)
                    mask[int(y) : int(y + h), int(x) : int(x + w)] = (
                        rng.random((int(y + h) - int(y), 1)) > 0.3
                    )
                    record["segmentation"] = rle(mask)
                found[m].append(record)
    return [
        Member(f"m{m}", frozenset({1, 2, 3} - ({3} if m == 2 else set())), r) for m, r in enumerate(found)
    ]


def xyxy(record: dict[str, Any]) -> list[float]:
    x, y, w, h = record["bbox"]
    return [x, y, x + w, y + h]


def test_fusion_by_nms_equals_a_brute_force() -> None:
    """Kept boxes come from torchvision; masks are a majority over all members whose best box agrees."""
    three = members()
    fused = fuse_members(three, "nms", SIZES, 0.5)
    assert fused
    for image, (height, width) in SIZES.items():
        all_of = [(m, r) for m, member in enumerate(three) for r in member.results if r["image_id"] == image]
        boxes = torch.tensor([xyxy(r) for _, r in all_of], dtype=torch.float64)
        scores = torch.tensor([r["score"] for _, r in all_of], dtype=torch.float64)
        labels = torch.tensor([r["category_id"] for _, r in all_of])
        most = max(sum(m == n for n, _ in all_of) for m in range(3))
        kept = batched_nms(boxes, scores, labels, 0.5).tolist()
        ours = [r for r in fused if r["image_id"] == image]
        assert [r["score"] for r in ours] == pytest.approx([all_of[k][1]["score"] for k in kept[:most]])
        overlaps = box_iou(boxes, boxes)
        for record, k in zip(ours, kept, strict=False):
            assert record["category_id"] == int(labels[k]) and record["bbox"] == pytest.approx(
                all_of[k][1]["bbox"]
            )
            # It belongs to the first kept box of its class that it overlaps.
            mine = [
                n
                for n in range(len(all_of))
                if labels[n] == labels[k]
                and next(j for j in kept if labels[j] == labels[n] and (j == n or overlaps[j, n] > 0.5)) == k
            ]
            votes = []
            for m in range(3):
                of_member = sorted((n for n in mine if all_of[n][0] == m), key=lambda n: -scores[n])
                if of_member and "segmentation" in all_of[of_member[0]][1]:
                    votes.append(mask_util.decode(all_of[of_member[0]][1]["segmentation"]).astype(float))
            x0, y0, x1, y1 = boxes[k].float().tolist()
            inside = np.zeros((height, width), bool)
            inside[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
            mean = np.mean(votes, axis=0) if votes else np.ones((height, width))
            assert record["segmentation"] == rle((mean >= 0.5) & inside)


def test_scores_average_over_the_members_that_know_the_class() -> None:
    """Both members that know class 3 agree: the score is their mean, not two thirds of it."""
    box = [5.0, 5.0, 10.0, 10.0]
    record = {"image_id": 1, "bbox": box}
    three = [
        Member("a", frozenset({1, 3}), [{**record, "category_id": 3, "score": 0.8}]),
        Member("b", frozenset({1, 3}), [{**record, "category_id": 3, "score": 0.6}]),
        Member("c", frozenset({1}), [{**record, "category_id": 1, "score": 0.9}]),
    ]
    fused = fuse_members(three, "wbf", SIZES)
    scores = {r["category_id"]: r["score"] for r in fused}
    assert scores == pytest.approx({3: 0.7}), "an image has as many detections as one member"
    three[0].results.append({**record, "category_id": 1, "score": 0.3})
    scores = {r["category_id"]: r["score"] for r in fuse_members(three, "wbf", SIZES)}
    assert scores == pytest.approx({3: 0.7, 1: 0.6 * 2 / 3})


def test_masks_of_members_that_agree() -> None:
    masks = np.zeros((3, 40, 60), bool)
    masks[0, 5:20, 5:20], masks[1, 10:25, 5:20], masks[2, 10:12, 0:60] = True, True, True
    found = mask_util.decode(mean_mask([rle(mask) for mask in masks], [4.5, 0, 19, 22.5], (40, 60)))
    expected = masks.mean(0) >= 0.5
    expected[23:], expected[:, :4], expected[:, 19:] = False, False, False
    assert (found == expected).all() and expected.any()


def test_classes_are_matched_by_name() -> None:
    reference = ((1, "cat"), (2, "dog"), (7, "cow"))
    classes, line = matched(reference, ((3, "dog"), (1, "cat"), (9, "bus")), "B")
    assert classes == ((2, "dog"), (1, "cat"), (-3, "bus"))
    assert line == "B: 2 classes by name; ids dog 3 -> 2; lacks cow; left out bus"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, 3]}, "record 0: bbox is not"),
        ({"score": None}, "record 0: no score"),
        ({"category_id": 8}, "record 0: category_id 8 is not among"),
        ({"image_id": 8}, "record 0: image_id 8 is not among"),
        ({"segmentation": [[1, 2, 3, 4]]}, "record 0: segmentation is not a compressed RLE"),
        ({"segmentation": {"size": [1, 1], "counts": "1"}}, "record 0: the size of the segmentation"),
    ],
)
def test_bad_results_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    good = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    file.write_text(json.dumps([good]))
    assert len(read_member(file, ((1, "cat"),), SIZES).results) == 1
    file.write_text(json.dumps([{**good, **change}]))
    with pytest.raises(InputError, match=message):
        read_member(file, ((1, "cat"),), SIZES)


def test_commands_fuse_models_and_results(tiny_export: Path, tmp_path: Path, capsys: Any) -> None:
    """Two exports, the second with classes in another order, and a results file; eval and predict agree."""
    make_demo(tmp_path / "data", 1, 3, 64, 0)
    other = tmp_path / "other"
    shutil.copytree(tiny_export, other)
    edit_json(other / "config.json", lambda c: {**c, "categories": c["categories"][::-1]})
    weights = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    weights["box_head.deltas.weight"] = 0.01 * torch.randn(
        weights["box_head.deltas.weight"].shape, generator=generator
    )
    save_file(weights, other / "model.safetensors")
    data = ["--annotations", str(tmp_path / "data/val.json"), "--workers", "0"]
    images = ["--images", str(tmp_path / "data/val")]
    ones = []
    for n, export in enumerate((tiny_export, other)):
        file = tmp_path / f"one_{n}.json"
        assert cli.main(["eval", str(export), *data, *images, "--results", str(file)]) == 0
        ones.append(Member(str(n), frozenset(CATEGORIES), json.loads(file.read_text())))
    capsys.readouterr()
    fused = tmp_path / "fused.json"
    arguments = [str(tiny_export), str(other)]
    assert cli.main(["eval", *arguments, *data, *images, "--fuse", "wbf", "--results", str(fused)]) == 0
    out = capsys.readouterr().out
    assert f"{other}: 4 classes by name; ids" not in out, "same ids, another order"
    assert "AP50" in out and "AP alone" in out
    truth = json.loads((tmp_path / "data/val.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    expected = fuse_members(ones, "wbf", sizes)
    ours = json.loads(fused.read_text())
    assert len(ours) == len(expected) > 3
    assert [r["score"] for r in ours] == pytest.approx([r["score"] for r in expected], abs=1e-5)

    # The same with the second model as a results file, and by predict.
    arguments = [str(tiny_export), str(tmp_path / "one_1.json")]
    assert cli.main(["eval", *arguments, *data, *images, "--fuse", "wbf", "--results", str(fused)]) == 0
    assert [r["bbox"] for r in json.loads(fused.read_text())] == [r["bbox"] for r in ours]
    command = ["predict", *arguments, images[1], *data[:2], "--fuse", "wbf", "--threshold", "0"]
    assert cli.main([*command, "--output", str(tmp_path / "out")]) == 0
    predicted = json.loads((tmp_path / "out/results.json").read_text())
    assert sorted(r["score"] for r in predicted) == pytest.approx(sorted(r["score"] for r in ours), abs=1e-4)
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    capsys.readouterr()
    for bad, words in (
        (["eval", *arguments, *data, *images], "--fuse to say how"),
        (["predict", str(tiny_export), images[1], "--fuse", "nms"], "give several models"),
        ([*command, "--tile", "32"], "--tile and --fuse exclude"),
        ([*command, "--fuse-iou", "1.5", "--output", str(tmp_path / "out")], "less than 1, got 1.5"),
        (
            ["predict", arguments[1], arguments[0], images[1], "--fuse", "nms"],
            "first member must be an export",
        ),
    ):
        assert cli.main(bad) == 2
        assert words in capsys.readouterr().err
