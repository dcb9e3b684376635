"""Measure how many images per second one loader process makes, compared with torchvision's v2 transforms.

python benchmarks/bench_data.py ANNOTATIONS IMAGES               # a COCO instances JSON and its image folder
python benchmarks/bench_data.py ANNOTATIONS IMAGES --profile     # and where giantdet's time goes

Both sides decode the same JPEG files and prepare image, boxes and masks as their models take them, on one
thread:

- resize: to a short side of 800, at most 1024 long, and a random flip.
- jitter: large-scale jitter, 0.1 to 2 times the canvas of 1024 x 1024, crop and flip.

giantdet collates a batch of one. torchvision decodes images by Pillow, as its `CocoDetection` does, or by its
own decoder (`--decoder torchvision`, the faster way), masks by pycocotools, then applies its v2 transforms to
tv_tensors, and pads the image to the canvas. They take turns, image by image, and a round is all images.
Seconds are those of the process, so that other load on the machine matters less.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_util
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from giantdet.config.types import AugmentConfig, DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.streams import TrainStream

CANVAS = 1024
SETTINGS = {
    "resize": (
        DataConfig(size=(CANVAS, CANVAS), short_side=800, workers=0),
        [v2.Resize(800, max_size=CANVAS, antialias=True)],
    ),
    "jitter": (
        DataConfig(size=(CANVAS, CANVAS), augment=AugmentConfig(jitter=(0.1, 2.0)), workers=0),
        [v2.ScaleJitter((CANVAS, CANVAS), (0.1, 2.0)), v2.RandomCrop(CANVAS, pad_if_needed=True)],
    ),
}
PARTS = {
    "decode JPEG": ("images.py", "read_image"),
    "resize and flip": ("transforms.py", "scaled_crop"),
    "masks": ("masks.py", "object_frames"),
    "canvas and batch": ("samples.py", "collate"),
}
"""Functions of `giantdet.data`, by the part that they belong to: (file, function)."""


def torchvision_sample(
    dataset: CocoDataset, i: int, transforms: v2.Transform, by_pillow: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return image i on the canvas, and its targets as torchvision's Mask R-CNN takes them."""
    objects = dataset.objects(i)
    if by_pillow:
        image = v2.functional.to_image(Image.open(dataset.path(i)).convert("RGB"))
    else:
        image = tv_tensors.Image(decode_jpeg(read_file(str(dataset.path(i))), ImageReadMode.RGB))
    masks = [mask_util.decode(objects.rle(n)) for n in range(len(objects))]
    target = {
        "boxes": tv_tensors.BoundingBoxes(objects.boxes_N4, format="XYXY", canvas_size=objects.size_hw),
        "labels": torch.from_numpy(objects.labels_N),
        "masks": tv_tensors.Mask(np.stack(masks)),
    }
    image, target = transforms(image, target)
    if image.shape[-2:] != (CANVAS, CANVAS):
        padded = torch.zeros(3, CANVAS, CANVAS, dtype=torch.uint8)
        padded[:, : image.shape[1], : image.shape[2]] = image
        image = padded
    return image, target


def measure(dataset: CocoDataset, name: str, by_pillow: bool, rounds: int, images: int) -> None:
    """Print images per second of both sides and the ratios of the rounds."""
    config, transforms = SETTINGS[name]
    stream = TrainStream(dataset, config, seed=0)
    theirs = v2.Compose([*transforms, v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes()])
    indices = stream.indices[:images]
    sides: dict[str, Callable[[int, int], object]] = {
        "giantdet": lambda k, i: stream.__getitems__([k]),
        "torchvision": lambda k, i: torchvision_sample(dataset, i, theirs, by_pillow),
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(-1, rounds):  # the first is a warm-up
        seconds = dict.fromkeys(sides, 0.0)
        for k, i in enumerate(indices[:10] if number < 0 else indices):
            for side, make in sides.items():
                start = time.process_time()
                make(number * len(stream) + k if number > 0 else k, int(i))
                seconds[side] += time.process_time() - start
        if number >= 0:
            for side, total in seconds.items():
                rates[side].append(len(indices) / total)
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    print(f"{name}: {len(indices)} images, {rounds} rounds")
    for side, values in rates.items():
        print(
            f"  {side:<12} {statistics.median(values):6.1f} images/s ({min(values):.1f} to {max(values):.1f})"
        )
    print(f"  ratios {' '.join(f'{r:.2f}' for r in ratios)}, median {statistics.median(ratios):.2f}")


def profile(dataset: CocoDataset, name: str, images: int) -> None:
    """Print the share of each part in the time of giantdet's side."""
    stream = TrainStream(dataset, SETTINGS[name][0], seed=0)
    recorder = cProfile.Profile(time.process_time)
    recorder.enable()
    for k in range(images):
        stream.__getitems__([k])
    recorder.disable()
    stats = pstats.Stats(recorder)
    found = {(file.rsplit("/", 1)[-1], what): row[3] for (file, _, what), row in stats.stats.items()}
    shares = {
        part: found.get(place, 0.0) / found["streams.py", "__getitems__"] for part, place in PARTS.items()
    }
    shares["rest"] = 1 - sum(shares.values())
    print(f"  shares in {name}: " + ", ".join(f"{part} {share:.0%}" for part, share in shares.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("annotations")
    parser.add_argument("images")
    parser.add_argument("--setting", choices=[*SETTINGS], help="only one of the two")
    parser.add_argument(
        "--decoder", choices=["pillow", "torchvision"], default="pillow", help="of torchvision"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=100, help="images of the data set that are used")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dataset = CocoDataset(args.annotations, args.images)
    for name in [args.setting] if args.setting else SETTINGS:
        measure(dataset, name, args.decoder == "pillow", args.rounds, args.limit)
        if args.profile:
            profile(dataset, name, args.limit)


if __name__ == "__main__":
    main()
