"""Measure the time and memory that opening an instances JSON of COCO's size takes, compared with pycocotools.

python benchmarks/bench_annotations.py                       # 118,000 images, 860,000 objects; 4 GiB
python benchmarks/bench_annotations.py --share 0.1 --ranks 4

The file is generated with random polygons. Each way runs in its own process: pycocotools' `COCO`, giantdet
with an empty cache, giantdet again, and several ranks at once. Memory is the growth of the process while it
opens the file: anonymous memory, which is not shared, and the peak of all memory. The cached file is shared.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from pycocotools.coco import COCO

from giantdet.data.coco import CocoDataset

IMAGES, OBJECTS = 118_000, 860_000
CORNERS = (6, 44)
"""Number of points of the polygons; COCO's have 25 on average."""


def make(file: TextIO, share: float) -> None:
    """Write an instances JSON of `share` times COCO's number of images and objects."""
    rng = np.random.default_rng(0)
    images, objects = round(IMAGES * share), round(OBJECTS * share)
    size = '"height":480,"width":640'
    rows = (f'{{"id":{n},"file_name":"{n:012}.jpg",{size}}}' for n in range(images))
    file.write('{"images":[' + ",".join(rows) + '],"categories":[')
    file.write(",".join(f'{{"id":{n + 1},"name":"class {n}"}}' for n in range(80)) + '],"annotations":[')
    for n in range(objects):
        corners = int(rng.integers(*CORNERS))
        centre, radius = rng.uniform(100, 380, 2), rng.uniform(4, 100)
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
        points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.6, 1)
        (x0, y0), (x1, y1) = points.min(0), points.max(0)
        record = {
            "id": n + 1,
            "image_id": int(rng.integers(images)),
            "category_id": int(rng.integers(80)) + 1,
            "segmentation": [points.round(2).ravel().tolist()],
            "bbox": [round(x0, 2), round(y0, 2), round(x1 - x0, 2), round(y1 - y0, 2)],
            "area": round(float(radius**2 * 2), 2),
            "iscrowd": 0,
        }
        file.write(("," if n else "") + json.dumps(record, separators=(",", ":")))
    file.write("]}")


def anonymous_mib() -> float:
    """Return the memory of this process that is not shared with others, in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str, annotations: str) -> None:
    """Open the file, read all objects of a thousand images, and print seconds and MiB as JSON."""
    opened: Callable[[str], Any]
    if way == "pycocotools":
        opened = COCO
    else:

        def opened(path: str) -> CocoDataset:
            return CocoDataset(path, Path(path).parent)

    before, start, peak = anonymous_mib(), time.perf_counter(), peak_mib()
    with contextlib.redirect_stdout(io.StringIO()):
        found = opened(annotations)
    seconds = time.perf_counter() - start
    if way != "pycocotools":
        for i in range(1000):
            objects = found.objects(i)
            for n in range(len(objects)):
                objects.rle(n)
    own, most = anonymous_mib() - before, peak_mib() - peak
    print(json.dumps({"seconds": round(seconds, 3), "MiB": round(own), "MiB at the peak": round(most)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="share of COCO's images and objects")
    parser.add_argument("--ranks", type=int, default=8, help="ranks that open the cached file at once")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        with path.open("w") as file:
            make(file, args.share)
        print(f"{path.stat().st_size / 2**20:.0f} MiB of JSON")
        environment = os.environ | {"GIANTDET_CACHE": str(Path(folder) / "cache"), "OMP_NUM_THREADS": "1"}

        def start(way: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, __file__, "--measure", way, str(path)]
            return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)

        for title, way in (("pycocotools", "pycocotools"), ("giantdet", ""), ("giantdet, again", "")):
            print(f"{title:<20} {start(way).communicate()[0].decode().strip()}", flush=True)
        sizes = [path.stat().st_size / 2**20 for path in (Path(folder) / "cache").glob("*.pack")]
        print(f"cached: {sum(sizes):.0f} MiB")
        ranks = [start("giantdet") for _ in range(args.ranks)]
        for rank, process in enumerate(ranks):
            print(f"{f'rank {rank}':<20} {process.communicate()[0].decode().strip()}")


if __name__ == "__main__":
    main()
