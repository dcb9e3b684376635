"""Cached annotations against those read from the JSON, in one process and in several at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from giantdet.data import coco, packed
from giantdet.data.coco import CocoDataset
from giantdet.errors import DataError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder; small files are cached too."""
    monkeypatch.setenv("GIANTDET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "LEAST_BYTES", 1)
    return tmp_path / "cache"


def write(file: Path, objects: int = 4) -> Path:
    """Write a file with records of all kinds: polygons, RLE, boxes, crowds, ignored, unusable, unusual."""
    box = {"bbox": [2, 3, 10.5, 8]}
    polygon = {"segmentation": [[2, 3, 12, 3, 12.25, 11, 2, 11], [4, 4, 6, 4, 6, 6]]} | box
    rle = {"segmentation": {"size": [20, 30], "counts": [100, 50, 450]}} | box
    kinds: list[dict[str, Any]] = [polygon, rle, box, polygon, *[polygon] * (objects - 4)]
    kinds += [
        polygon | {"iscrowd": 1},
        rle | {"ignore": 1},
        box | {"iscrowd": "0"},
        box | {"bbox": [0, 0, 0, 1]},
    ]
    content = {
        "images": [
            {"id": n + 7, "file_name": f"\u00e4\ud800{n}.png", "height": 20, "width": 30} for n in range(3)
        ],
        "categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 5, "name": "again"}],
        "annotations": [
            kind | {"id": n, "image_id": 7 + n % 2, "category_id": 2 + n % 2 * 3}
            for n, kind in enumerate(kinds)
        ],
    }
    file.write_text(json.dumps(content))
    return file


def state(dataset: CocoDataset) -> dict[str, Any]:
    """Return all attributes; arrays as dtype, shape and bytes."""
    return {
        name: (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value
        for name, value in vars(dataset).items()
    }


def fail_to_read(*args: object, **kwargs: object) -> Any:
    raise AssertionError("the JSON was read")


def test_everything_read_counted_and_logged_is_cached(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "a.json")
    monkeypatch.setenv("GIANTDET_CACHE", "")
    plain, messages = CocoDataset(file, tmp_path), caplog.messages[:]
    assert not cache.exists() and len(messages) >= 3 and len(plain.skipped) >= 2 and plain.noted
    monkeypatch.setenv("GIANTDET_CACHE", str(cache))
    first = CocoDataset(file, tmp_path)
    monkeypatch.setattr(coco, "read_instances", fail_to_read)
    caplog.clear()
    second = CocoDataset(file, tmp_path)
    assert state(plain) == state(first) == state(second)
    assert [type(v) for v in vars(plain).values()] == [type(vars(second)[name]) for name in vars(plain)]
    assert caplog.messages == messages and len(second.boxes_K4) and len(second.rle_bytes) and second.noted
    assert second.summary() == plain.summary()
    for i in range(3):
        assert second.ignored(i) == plain.ignored(i)
        assert (second.objects(i).masks() == plain.objects(i).masks()).all()
    second.boxes_K4[:] = 0  # changes this process's copy only
    assert state(CocoDataset(file, tmp_path)) == state(plain)


def test_small_files_are_not_cached(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.json")
    monkeypatch.setattr(packed, "LEAST_BYTES", file.stat().st_size + 1)
    CocoDataset(file, tmp_path)
    assert not cache.exists()


def test_changed_annotations_or_code_invalidate_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.json")
    assert len(CocoDataset(file, tmp_path).labels_K) == 5
    (first,) = cache.glob("*.pack")
    os.utime(write(file, objects=9), ns=(1, 1))
    assert len(CocoDataset(file, tmp_path).labels_K) == 10
    (second,) = cache.glob("*.pack")
    other = write(tmp_path / "b.json")
    CocoDataset(other, tmp_path)
    assert first != second and len(list(cache.glob("*.pack"))) == 2, "each file has its own pack"
    monkeypatch.setattr(packed, "_rules", lambda: "other rules")
    monkeypatch.setattr(coco, "read_instances", fail_to_read)
    with pytest.raises(AssertionError, match="the JSON was read"):
        CocoDataset(file, tmp_path)


def test_annotations_that_change_while_they_are_read_are_not_cached(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.json")

    def read_and_change(*args: Any, **kwargs: Any) -> Any:
        content = read(*args, **kwargs)
        os.utime(file, ns=(1, 1))
        return content

    read = coco.read_instances
    monkeypatch.setattr(coco, "read_instances", read_and_change)
    CocoDataset(file, tmp_path)
    assert not list(cache.glob("*.pack"))


def test_a_damaged_pack_is_replaced(tmp_path: Path, cache: Path) -> None:
    file = write(tmp_path / "a.json")
    want = state(CocoDataset(file, tmp_path))
    (pack,) = cache.glob("*.pack")
    whole = pack.read_bytes()
    for damaged in (b"", whole[:5], whole[:300], whole[:-64], b"\xff" * 100, whole[:8] + b"[" + whole[9:]):
        pack.write_bytes(damaged)
        assert state(CocoDataset(file, tmp_path)) == want
        assert pack.read_bytes() == whole


def test_an_unwritable_folder(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "a.json")
    want = state(CocoDataset(file, tmp_path))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GIANTDET_CACHE", str(tmp_path / "file"))
    caplog.clear()
    assert state(CocoDataset(file, tmp_path)) == want
    assert caplog.messages[0].startswith(f"annotations are not cached in {tmp_path}/file (")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("GIANTDET_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(os, "replace", full)
    caplog.clear()
    assert state(CocoDataset(file, tmp_path)) == want
    assert "No space left on device" in caplog.messages[0]
    assert [path.suffix for path in (tmp_path / "full").iterdir()] == [".lock"], "no partial file is left"


def open_slowly(file: Path, log: Path, results: Any) -> None:
    """Open the file in another process; reading its JSON takes a while and writes a line to `log`."""

    def read_slowly(*args: Any, **kwargs: Any) -> Any:
        with log.open("a") as lines:
            lines.write("read\n")
        time.sleep(0.3)
        return read(*args, **kwargs)

    read = coco.read_instances
    coco.read_instances = read_slowly
    try:
        results.put(len(CocoDataset(file, file.parent).labels_K))
    except DataError as error:
        results.put(str(error))


@pytest.mark.parametrize("usable", [True, False])
def test_the_first_process_reads_for_all_processes(tmp_path: Path, cache: Path, usable: bool) -> None:
    file = write(tmp_path / "a.json")
    if not usable:
        file.write_text("[]")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=open_slowly, args=(file, tmp_path / "log", results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    if usable:
        assert found == [5, 5, 5] and (tmp_path / "log").read_text() == "read\n"
    else:
        assert len(set(found)) == 1 and "have no list" in found[0], "each process reports the problem"
