"""Order, seeking, ranks, counters and bad images in the loaders."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import environment, run_together

from giantdet.config.types import AugmentConfig, DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.demo import make_demo
from giantdet.data.loader import EndFlag, Loader, eval_loader, train_loader
from giantdet.data.streams import BOXES_AND_MASKS, TrainStream, sample_index
from giantdet.structures import Batch

CONFIG = DataConfig(
    size=(64, 96),
    short_side=48,
    max_objects=20,
    mask_frame=28,
    workers=0,
    augment=AugmentConfig(jitter=(0.5, 1.5)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    make_demo(path, 22, 5, size=64)
    return path


@pytest.fixture
def dataset(folder: Path) -> CocoDataset:
    return CocoDataset(folder / "train.json", folder / "train")


def take(loader: Loader, n: int) -> list[Batch]:
    batches = [next(loader) for _ in range(n)]
    loader.close()
    return batches


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [*(t for t in batch if isinstance(t, torch.Tensor)), *batch.targets]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for p, q in zip(a, b, strict=True)
        for x, y in zip(tensors(p), tensors(q), strict=True)
    )


def joined(batches: list[Batch]) -> list[Batch]:
    targets = type(batches[0].targets)(*map(torch.cat, zip(*(b.targets for b in batches), strict=True)))
    whole = {
        f: torch.cat([getattr(b, f) for b in batches])
        for f in Batch._fields
        if f not in ("targets", "windows_B6")
    }
    return [Batch(targets=targets, **whole)]


def test_order_visits_each_image_once_per_epoch() -> None:
    order = [sample_index(k, 7, seed=3) for k in range(21)]
    epochs = [order[:7], order[7:14], order[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order != [sample_index(k, 7, seed=4) for k in range(21)]
    assert [sample_index(k, 7, 3, shuffle=False) for k in range(9)] == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert sample_index(10**12, 7, 3) in range(7), "seeking does not step through the samples"


def test_shapes_and_meaning(dataset: CocoDataset) -> None:
    (batch,) = take(train_loader(dataset, CONFIG, 3, seed=1), 1)
    targets = batch.targets
    assert batch.images_B3HW.shape == (3, 3, 64, 96) and batch.images_B3HW.dtype == torch.uint8
    assert targets.boxes_BM4.shape == (3, 20, 4) and targets.masks_BMSS.shape == (3, 20, 28, 28)
    assert targets.boxes_BM4.dtype == targets.frames_BM4.dtype == torch.float32
    assert targets.valid_BM.any(dim=1).any() and batch.seeds_B.tolist() == [0, 1, 2]
    for field in (targets.boxes_BM4, targets.labels_BM, targets.masks_BMSS, targets.frames_BM4):
        assert not field[~targets.valid_BM].any()
    width_height = targets.boxes_BM4[..., 2:] - targets.boxes_BM4[..., :2]
    assert (width_height[targets.valid_BM] >= 1).all()
    size = batch.sizes_B2.flip(1).repeat(1, 2)[:, None]
    assert ((targets.boxes_BM4 >= 0) & (targets.boxes_BM4 <= size)).all()
    assert batch.original_sizes_B2.tolist() == [[64, 64]] * 3
    (plain,) = take(train_loader(dataset, CONFIG, 3, seed=1, targets=frozenset({"boxes"})), 1)
    assert plain.targets.masks_BMSS.shape == (3, 20, 0, 0)
    assert torch.equal(plain.targets.boxes_BM4, targets.boxes_BM4)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_stream(dataset: CocoDataset, workers: int) -> None:
    alone = take(train_loader(dataset, CONFIG, 2, seed=5), 16)
    state = torch.random.get_rng_state()
    many = take(train_loader(dataset, CONFIG.model_copy(update={"workers": workers}), 2, seed=5), 16)
    assert same(alone, many)
    assert torch.equal(state, torch.random.get_rng_state()), "loaders do not change the global random state"


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_stream(dataset: CocoDataset, world: int) -> None:
    alone = take(train_loader(dataset, CONFIG, 4, seed=5), 8)
    ranks = [take(train_loader(dataset, CONFIG, 4 // world, r, world, seed=5), 8) for r in range(world)]
    for t in range(8):
        assert same([alone[t]], joined([ranks[r][t] for r in range(world)]))


def test_seeking_equals_iterating(dataset: CocoDataset) -> None:
    running = take(train_loader(dataset, CONFIG, 3, 1, 2, seed=5), 12)
    seeking = take(train_loader(dataset, CONFIG, 3, 1, 2, start_micro_step=9, seed=5), 3)
    assert same(running[9:], seeking)
    assert not same(running[:3], seeking)


def test_empty_images_are_left_out_of_training_only(dataset: CocoDataset) -> None:
    empty = {int(i) for i in dataset.image_ids} - {int(i) for i in dataset.image_ids[dataset.nonempty]}
    assert empty, "the demo has empty images"
    seen = {i for b in take(train_loader(dataset, CONFIG, 7), 7) for i in b.image_ids_B.tolist()}
    assert not seen & empty
    keep = CONFIG.model_copy(update={"filter_empty": False})
    batches = take(train_loader(dataset, keep, 11), 2)
    assert {i for b in batches for i in b.image_ids_B.tolist()} == set(dataset.image_ids.tolist())
    for batch in batches:
        for b, i in enumerate(batch.image_ids_B.tolist()):
            assert i not in empty or not batch.targets.valid_BM[b].any()


def test_nothing_to_train_on(tmp_path: Path) -> None:
    make_demo(tmp_path, 2, 0, size=32)
    content = json.loads((tmp_path / "train.json").read_text()) | {"annotations": []}
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="nothing to train on"):
        train_loader(CocoDataset(tmp_path / "train.json", tmp_path / "train"), CONFIG, 1)


def test_the_largest_objects_are_kept(dataset: CocoDataset, caplog: pytest.LogCaptureFixture) -> None:
    still = CONFIG.model_copy(update={"augment": AugmentConfig(flip=0.0), "size": (64, 64), "short_side": 64})
    few = still.model_copy(update={"max_objects": 3})
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        loader = train_loader(dataset, few, 1)
        batches = [next(loader) for _ in range(len(dataset.nonempty))]
    expected_dropped = 0
    for batch in batches:
        index = dataset.image_ids.tolist().index(int(batch.image_ids_B[0]))
        boxes = torch.from_numpy(dataset.objects(index).boxes_N4)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        kept = batch.targets.boxes_BM4[0][batch.targets.valid_BM[0]]
        kept_areas = (kept[:, 2:] - kept[:, :2]).prod(dim=1)
        assert (
            kept_areas.sort(descending=True).values.tolist()
            == areas.sort(descending=True).values[:3].tolist()
        )
        expected_dropped += max(len(areas) - 3, 0)
    assert loader.counters["dropped_objects"] == expected_dropped > 0
    assert sum("dropped_objects" in record.message for record in caplog.records) == 1


def test_tiny_objects_are_counted(dataset: CocoDataset) -> None:
    tiny = CONFIG.model_copy(update={"augment": AugmentConfig(), "size": (32, 32), "short_side": 4})
    loader = train_loader(dataset, tiny, len(dataset.nonempty), seed=0)
    kept = int(next(loader).targets.valid_BM.sum())
    assert loader.counters["tiny_objects"] > 0
    assert kept + loader.counters["tiny_objects"] + loader.counters["dropped_objects"] == len(
        dataset.labels_K
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    make_demo(tmp_path, 12, 0, size=48)
    config = CONFIG.model_copy(update={"workers": workers})
    dataset = CocoDataset(tmp_path / "train.json", tmp_path / "train")
    good = take(train_loader(dataset, config, 4, seed=2), 6)
    broken = [int(dataset.nonempty[i]) for i in (1, 4)]
    (path := dataset.path(broken[0])).write_bytes(path.read_bytes()[:400])
    dataset.path(broken[1]).unlink()
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        loader = train_loader(dataset, config, 4, seed=2)
        batches = [next(loader) for _ in range(6)]
    bad_ids = {int(dataset.image_ids[i]) for i in broken}
    stream, replaced = TrainStream(dataset, config, 2), 0
    for before, after in zip(good, batches, strict=True):
        for b in range(4):
            k, images = int(after.seeds_B[b]), []
            while not images or images[-1] in bad_ids:
                images.append(int(dataset.image_ids[stream.indices[sample_index(k, len(stream), 2)]]))
                k += 1
            assert int(after.image_ids_B[b]) == images[-1]
            replaced += len(images) - 1
            if len(images) == 1:
                assert torch.equal(before.images_B3HW[b], after.images_B3HW[b])
    assert loader.counters["replaced_images"] == replaced > 0
    for i in broken:
        named = [r.message for r in caplog.records if str(dataset.path(i)) in r.message]
        assert len(named) == 1, "named once"
    loader.close()


def test_a_broken_mask_counts_as_a_bad_image(dataset: CocoDataset, caplog: pytest.LogCaptureFixture) -> None:
    row = int(np.flatnonzero(dataset.segment_kind == 2)[0])
    end = dataset.segments_K2[row, 1]
    dataset.rle_bytes = dataset.rle_bytes.copy()
    dataset.rle_bytes[end - 1] = dataset.rle_bytes[end - 1] ^ 1
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        loader = train_loader(dataset, CONFIG, len(dataset.nonempty))
        next(loader)
    assert loader.counters["replaced_images"] >= 1
    assert f"annotation {dataset.ids_K[row]}: its RLE does not add up" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_only_bad_images(tmp_path: Path, workers: int) -> None:
    make_demo(tmp_path, 3, 0, size=32)
    dataset = CocoDataset(tmp_path / "train.json", tmp_path / "train")
    for i in range(3):
        dataset.path(i).write_bytes(b"no image")
    loader = train_loader(dataset, CONFIG.model_copy(update={"workers": workers}), 2)
    with pytest.raises(ValueError, match="50 images in a row cannot be used") as caught:
        next(loader)
    assert "\n" not in str(caught.value)


def test_python_exits_while_something_references_the_workers(folder: Path) -> None:
    """A failed test's traceback kept a reference, and the whole run hung at exit."""
    code = f"""
from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.loader import train_loader
config = DataConfig(size=(64, 64), short_side=64, workers=1)
loader = train_loader(CocoDataset("{folder}/train.json", "{folder}/train"), config, 2)
next(loader)
kept = loader._deliveries
del loader
print("here")
"""
    (ended,) = run_together([([sys.executable, "-c", code], environment())])
    assert (ended.code, ended.out) == (0, "here\n"), ended.err


@pytest.mark.parametrize(("world", "batch"), [(1, 1), (2, 2), (4, 2), (3, 4)])
def test_evaluation_sees_each_image_once(folder: Path, world: int, batch: int) -> None:
    dataset = CocoDataset(folder / "val.json", folder / "val")
    loaders = [eval_loader(dataset, CONFIG, batch, r, world) for r in range(world)]
    batches = [list(loader) for loader in loaders]
    assert {len(b) for b in batches} == {loaders[0].steps}
    ids = [i for rank in batches for b in rank for i in b.image_ids_B.tolist()]
    assert sorted(i for i in ids if i >= 0) == sorted(dataset.image_ids.tolist())
    assert ids.count(-1) == world * batch * len(batches[0]) - 5
    for b in (b for rank in batches for b in rank):
        fill = b.image_ids_B == -1
        assert not b.images_B3HW[fill].any() and (b.sizes_B2 > 0).all() and (b.original_sizes_B2 > 0).all()
        assert (b.sizes_B2[~fill] == 48).all() and b.targets.boxes_BM4.shape == (batch, 0, 4)
    (with_targets,) = list(eval_loader(dataset, CONFIG, 5, targets=BOXES_AND_MASKS))
    assert int(with_targets.targets.valid_BM.sum()) == len(dataset.labels_K)


def test_evaluation_names_unreadable_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_demo(tmp_path, 0, 3, size=32)
    dataset = CocoDataset(tmp_path / "val.json", tmp_path / "val")
    dataset.path(1).write_bytes(b"no image")
    loader = eval_loader(dataset, CONFIG, 1)
    with caplog.at_level(logging.WARNING, logger="giantdet"):
        ids = [int(b.image_ids_B[0]) for b in loader]
    assert ids == [int(dataset.image_ids[0]), -1, int(dataset.image_ids[2])]
    assert loader.counters["unreadable_images"] == 1 and str(dataset.path(1)) in caplog.text


class Deadly(CocoDataset):
    def read_image(self, i: int) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGTERM)  # ignored in workers
        if self.image_ids[i] == self.image_ids[3]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read_image(i)


def test_workers_ignore_stop_signals_and_their_death_is_an_error(folder: Path) -> None:
    dataset = Deadly(folder / "val.json", folder / "val")
    loader = eval_loader(dataset, CONFIG.model_copy(update={"workers": 1}), 1)
    assert [int(next(loader).image_ids_B[0]) for _ in range(1)] == [int(dataset.image_ids[0])]
    with pytest.raises(RuntimeError, match="worker"):
        list(loader)


def test_a_process_killed_while_it_reads_the_end_flag_blocks_nobody() -> None:
    """With `multiprocessing.Event` in place of `EndFlag`, one of these kills leaves its lock taken."""
    flag = EndFlag()
    for _ in range(20):
        ready, tell = os.pipe()
        child = os.fork()
        if not child:
            os.write(tell, b"1")
            while not flag.is_set():
                pass
            os._exit(1)
        os.read(ready, 1)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        os.close(ready), os.close(tell)
    setter = threading.Thread(target=flag.set, daemon=True)
    setter.start()
    setter.join(10)
    assert not setter.is_alive() and flag.is_set()


def test_torch_polls_the_end_flag(dataset: CocoDataset) -> None:
    loader = train_loader(dataset, CONFIG.model_copy(update={"workers": 1}), 2)
    next(loader)
    flag = loader._deliveries._workers_done_event  # type: ignore[attr-defined]
    assert isinstance(flag, EndFlag) and not flag.is_set()
    (worker,) = loader._deliveries._workers  # type: ignore[attr-defined]
    loader.close()
    assert flag.is_set() and worker.exitcode == 0


def test_workers_are_restarted_where_their_death_ended_the_pinning_thread(dataset: CocoDataset) -> None:
    """The message that torch has for it. Torch starts this thread only where there is a GPU."""
    expected = take(train_loader(dataset, CONFIG, 2, seed=5), 2)
    loader = train_loader(dataset, CONFIG.model_copy(update={"workers": 1}), 2, seed=5)
    found = [next(loader)]
    loader.close()

    def dead() -> Iterator[None]:
        raise RuntimeError("Pin memory thread exited unexpectedly")
        yield

    loader._deliveries = dead()  # type: ignore[assignment]
    found.append(next(loader))
    loader.close()
    assert same(expected, found) and loader.counters["worker_restarts"] == 1


def test_killed_workers_are_restarted(dataset: CocoDataset, caplog: pytest.LogCaptureFixture) -> None:
    """Whenever they die, the stream does not change."""
    expected = take(train_loader(dataset, CONFIG, 2, seed=5), 9)
    loader = train_loader(dataset, CONFIG.model_copy(update={"workers": 2}), 2, seed=5)
    found = [next(loader), next(loader)]
    for _ in range(3):
        for worker in loader._deliveries._workers:  # type: ignore[attr-defined]
            os.kill(worker.pid, signal.SIGKILL)
        found += [next(loader), next(loader)]
    found.append(next(loader))
    assert loader.counters["worker_restarts"] == 3 and "all are restarted" in caplog.text
    loader.close()
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.images_B3HW, other.images_B3HW)
        assert torch.equal(one.seeds_B, other.seeds_B)
