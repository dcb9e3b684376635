"""Measure an evaluation without the forward pass: detections to COCO results, and AP by each backend.

python benchmarks/bench_eval.py                    # 500 images of 640 x 480, 100 detections each, one thread
python benchmarks/bench_eval.py --images 5000 --backends hotcoco

Detections are blurred ellipses in boxes of all sizes, in batches of one image; some of them are near the
objects, which are polygons of 24 points. The backends take turns, and each ratio is of two neighbouring runs.
Seconds are of processor time, which depends less on other processes on the machine than wall time.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from bench_masks import make_detections

from giantdet.config.json_text import json_text
from giantdet.data.truth import ground_truth
from giantdet.engine.predict import no_targets
from giantdet.evaluation.backends import BACKENDS, check_backend
from giantdet.evaluation.coco import coco_scores, to_coco
from giantdet.evaluation.coco_results import CocoResults
from giantdet.structures import Batch, Detections

CLASSES, OBJECTS = 80, 7


def make_image(number: int, size_hw: tuple[int, int], count: int) -> tuple[Detections, list[dict]]:
    """Return the detections of an image, and the annotations of its objects, near the first of them."""
    rng = np.random.default_rng(number)
    masks_DSS, boxes_D4 = make_detections(size_hw, count, number)
    labels = rng.integers(0, CLASSES, count)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    objects = []
    for n in range(min(OBJECTS, count)):
        x0, y0, x1, y1 = boxes_D4[n].numpy().astype(np.float64) + rng.normal(0, 2, 4)
        w, h = max(x1 - x0, 4.0), max(y1 - y0, 4.0)
        points = np.stack([x0 + w / 2 * (1 + np.cos(angles)), y0 + h / 2 * (1 + np.sin(angles))], 1)
        objects.append(
            {
                "id": number * OBJECTS + n + 1,
                "image_id": number + 1,
                "category_id": int(labels[n]) + 1,
                "bbox": [x0, y0, w, h],
                "area": w * h * np.pi / 4,
                "iscrowd": 0,
                "segmentation": [points.ravel().round(2).tolist()],
            }
        )
    scores = torch.from_numpy(np.sort(rng.random(count).astype(np.float32))[::-1].copy())
    found = Detections(
        boxes_D4[None],
        scores[None],
        torch.from_numpy(labels)[None],
        torch.ones(1, count, dtype=torch.bool),
        masks_DSS[None],
    )
    return found, objects


def batch_of(number: int, size_hw: tuple[int, int]) -> Batch:
    size_12 = torch.tensor([size_hw])
    return Batch(
        images_B3HW=torch.zeros(1, 3, 1, 1, dtype=torch.uint8),
        sizes_B2=size_12.float(),
        targets=no_targets(1),
        seeds_B=torch.zeros(1, dtype=torch.int64),
        image_ids_B=torch.tensor([number + 1]),
        original_sizes_B2=size_12,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=[*BACKENDS], choices=[*BACKENDS])
    args = parser.parse_args()
    for backend in args.backends:
        check_backend(backend)
    torch.set_num_threads(args.threads)
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # hotcoco's threads
    size_hw = (args.height, args.width)
    print(f"machine: {platform.machine()}, {args.threads} threads")
    print(f"{args.images} images of {args.width} x {args.height}, {args.detections} detections each")

    parts: list[CocoResults] = []
    annotations: list[dict] = []
    seconds = 0.0
    for number in range(args.images):
        found, objects = make_image(number, size_hw, args.detections)
        annotations += objects
        batch = batch_of(number, size_hw)
        start = time.process_time()
        parts.append(to_coco(found, batch, range(1, CLASSES + 1)))
        seconds += time.process_time() - start
    start = time.process_time()
    results = CocoResults.joined(parts)
    seconds += time.process_time() - start
    print(f"to COCO results: {seconds:.2f} s, {1000 * seconds / args.images:.2f} ms per image")

    content = {
        "images": [
            {"id": n + 1, "file_name": f"{n}.jpg", "height": args.height, "width": args.width}
            for n in range(args.images)
        ],
        "annotations": annotations,
        "categories": [{"id": n + 1, "name": f"class {n + 1}"} for n in range(CLASSES)],
    }
    with TemporaryDirectory() as folder:
        file = Path(folder) / "truth.json"
        file.write_text(json_text(content))
        start = time.process_time()
        truth = ground_truth(file)
        print(f"ground truth: {time.process_time() - start:.2f} s")
    for kind in ("bbox", "segm"):
        times: dict[str, list[float]] = {backend: [] for backend in args.backends}
        scores = {}
        for _ in range(args.repetitions):
            for backend in args.backends:
                start = time.process_time()
                scores[backend] = coco_scores(truth, results, kind, backend=backend)
                times[backend].append(time.process_time() - start)
        first = args.backends[0]
        for backend in args.backends:
            ratios = [ours / theirs for ours, theirs in zip(times[first], times[backend], strict=True)]
            print(
                f"{kind} {backend:<12} {statistics.median(times[backend]):7.2f} s, "
                f"AP {scores[backend]['AP']:.4f}, {first}'s time / its own: {statistics.median(ratios):.1f}, "
                f"same numbers: {scores[backend] == scores[first]}"
            )


if __name__ == "__main__":
    main()
