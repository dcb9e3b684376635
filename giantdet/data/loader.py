"""Load images into batches of fixed shape, in an order that a run can resume at any step.

The training stream is an endless sequence of samples k = 0, 1, 2, ... Sample k is a pure function of
(seed, k): which image, how it is scaled and flipped. Micro-step t of rank r of W with B images a
micro-batch holds the samples [(t W + r) B, (t W + r) B + B). So the stream is the same for any number of
workers, ranks of equal W x B see the same global batches, and seeking is free.

Nothing is dropped silently: objects beyond the M slots, objects below a pixel and unreadable images are
counted in `Loader.counters`, and named in warnings of the logger "giantdet".
"""

from __future__ import annotations

import atexit
import functools
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from giantdet.config.types import DataConfig
from giantdet.data.dataset import Dataset
from giantdet.data.records import logger
from giantdet.data.samples import NO_MAP, Sample, collate, make_sample
from giantdet.data.transforms import draw_geometry
from giantdet.errors import DataError
from giantdet.structures import IGNORE, Batch

MAX_BAD_IN_A_ROW = 50
MAX_RESTARTS = 3
BOXES_AND_MASKS = frozenset({"boxes", "masks"})
_AUGMENT = 1  # second word of the augmentation's seeds; the permutations use 0
_EXPLAIN = {
    "dropped_objects": "objects beyond max_objects, the smallest of each image, are left out",
    "tiny_objects": "objects narrower than a pixel after scaling are left out",
    "replaced_images": "images that cannot be used were replaced by the next of the stream",
    "unreadable_images": "images that cannot be used are evaluated as images without detections",
    "worker_restarts": "workers that died were restarted",
}


class Delivery(NamedTuple):
    """What workers send. An error is sent as text, since torch wraps a worker's exceptions in a traceback."""

    batch: Batch | None
    counts: dict[str, int]
    bad: tuple[str, ...]
    error: str


@functools.lru_cache(maxsize=4)
def _permutation(epoch: int, n: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed % 2**63, 0, epoch)).permutation(n)


def sample_index(k: int, n: int, seed: int, shuffle: bool = True) -> int:
    """Return which of n images sample k is: every image once per epoch, in a new order each epoch."""
    return int(_permutation(k // n, n, seed)[k % n]) if shuffle else k % n


class _Stream(TorchDataset[Sample]):
    """Base of both streams: turns lists of sample numbers into deliveries."""

    def __init__(self, dataset: Dataset, config: DataConfig, targets: frozenset[str]) -> None:
        self.dataset, self.config, self.targets = dataset, config, targets
        self.side = config.mask_frame if "masks" in targets else 0

    def __getitem__(self, k: int) -> Sample:
        raise NotImplementedError

    def __getitems__(self, numbers: list[int]) -> Delivery:
        """Make the delivery of one batch's sample numbers; called by torch's fetcher."""
        try:
            samples = [self[k] for k in numbers]
        except DataError as error:
            return Delivery(None, {}, (), str(error))
        counts = Counter[str]()
        for sample in samples:
            counts.update(sample.counts)
        slots = self.config.max_objects if "boxes" in self.targets else 0
        batch = collate(samples, slots, self.side)
        return Delivery(batch, dict(counts), tuple(text for s in samples for text in s.bad), "")


class TrainStream(_Stream):
    """The training stream; the module's docstring defines sample k."""

    def __init__(
        self, dataset: Dataset, config: DataConfig, seed: int, targets: frozenset[str] = BOXES_AND_MASKS
    ) -> None:
        super().__init__(dataset, config, targets)
        self.seed = seed
        self.indices = dataset.training_indices(config.filter_empty)
        if len(self.indices) == 0:
            raise DataError(f"no image of {dataset.annotations} has an object; there is nothing to train on")

    def __len__(self) -> int:
        """Return the number of samples per epoch."""
        return len(self.indices)

    def __getitem__(self, k: int) -> Sample:
        """Return sample k. The image of k + 1, k + 2, ... replaces a bad one, with k's random numbers."""
        bad: list[str] = []
        for j in range(k, k + MAX_BAD_IN_A_ROW):
            i = int(self.indices[sample_index(j, len(self), self.seed)])
            height, width = self.dataset.sizes_hw[i]
            rng = np.random.default_rng((self.seed % 2**63, _AUGMENT, k))
            geometry = draw_geometry(rng, (int(height), int(width)), self.config, training=True)
            try:
                sample = make_sample(self.dataset, i, k, self.config, geometry, self.targets)
            except DataError as error:
                path = str(self.dataset.path(i))
                bad.append(str(error) if path in str(error) else f"{path}: {error}")
                continue
            return sample._replace(counts=sample.counts | {"replaced_images": len(bad)}, bad=tuple(bad))
        # If the whole data set is bad, all ranks name the same example, and the error is printed once.
        annotations = self.dataset.annotations
        raise DataError(f"{annotations}: {MAX_BAD_IN_A_ROW} images in a row cannot be used, e.g. {min(bad)}")


class EvalStream(_Stream):
    """The evaluation stream: sample k is image k; numbers beyond the data set fill up the last batches."""

    def __init__(self, dataset: Dataset, config: DataConfig, targets: frozenset[str]) -> None:
        super().__init__(dataset, config, targets)
        self._no_rng = np.random.default_rng(0)

    def __getitem__(self, k: int) -> Sample:
        if k >= len(self.dataset):
            return self._nothing(k)
        height, width = (int(v) for v in self.dataset.sizes_hw[k])
        geometry = draw_geometry(self._no_rng, (height, width), self.config, training=False)
        try:
            return make_sample(self.dataset, k, k, self.config, geometry, self.targets)
        except DataError as error:
            return self._nothing(k)._replace(counts={"unreadable_images": 1}, bad=(str(error),))

    def _nothing(self, k: int) -> Sample:
        """Return a black image that fills the canvas, with the id -1 and no object."""
        size = self.config.size
        none = np.zeros((0, 4), np.float32)
        masks = np.zeros((0, self.side, self.side), np.uint8)
        return Sample(
            np.zeros((*size, 3), np.uint8),
            size,
            size,
            -1,
            k,
            none,
            np.zeros(0, np.int64),
            masks,
            none,
            {},
            (),
            np.full(size, IGNORE, np.uint8) if "semantic" in self.targets else NO_MAP,
        )


class RankSampler(Sampler[list[int]]):
    """Yields sample numbers of one rank's micro-batches, micro-steps `start` to `stop` (None: endless)."""

    def __init__(self, batch: int, rank: int, world: int, start: int = 0, stop: int | None = None) -> None:
        self.batch, self.rank, self.world, self.start, self.stop = batch, rank, world, start, stop

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while self.stop is None or step < self.stop:
            first = (step * self.world + self.rank) * self.batch
            yield list(range(first, first + self.batch))
            step += 1


# Workers ignore SIGTERM, by which multiprocessing ends them when Python exits, so it would wait for them for
# ever. Therefore this module ends torch's iterators, at the latest in this `atexit` function: a loader that
# was dropped is gone by then, but the traceback of an exception may still hold its iterator.
_iterators: set[Any] = set()


@atexit.register
def _end_all() -> None:
    for deliveries in list(_iterators):
        _end(deliveries)


def _end(deliveries: Any) -> None:
    """End the workers of one of torch's iterators."""
    _iterators.discard(deliveries)
    shutdown = getattr(deliveries, "_shutdown_workers", None)  # an iterator without workers has none
    if shutdown is not None:
        shutdown()


class Loader:
    """Iterator of `Batch`; `counters` counts what was left out of the batches delivered so far."""

    def __init__(self, stream: _Stream, sampler: RankSampler, pin_memory: bool) -> None:
        self.counters: Counter[str] = Counter(dict.fromkeys(_EXPLAIN, 0))
        self.steps = None if sampler.stop is None else sampler.stop - sampler.start
        self._stream, self._sampler, self._pin_memory = stream, sampler, pin_memory
        self._named: set[str] = set()
        self._delivered = self._restarts = 0
        self._start()

    def _start(self) -> None:
        """Make torch's iterator, from the first batch that was not delivered yet."""
        sampler = self._sampler
        sampler = RankSampler(
            sampler.batch, sampler.rank, sampler.world, sampler.start + self._delivered, sampler.stop
        )
        self._deliveries: Iterator[Delivery] = iter(
            DataLoader(
                self._stream,
                batch_sampler=sampler,
                num_workers=self._stream.config.workers,
                collate_fn=_as_is,
                worker_init_fn=_init_worker,
                pin_memory=self._pin_memory,
                # torch draws a base seed for its workers. A separate generator keeps the global random state
                # independent of whether and when loaders are made.
                generator=torch.Generator().manual_seed(0),
            )
        )
        _iterators.add(self._deliveries)
        weakref.finalize(self, _end, self._deliveries)
        if threading.current_thread() is threading.main_thread():
            # Otherwise torch raises a worker's death wherever the main thread is, for example in a backward.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        delivery = self._next_delivery()
        for text in delivery.bad:
            if text not in self._named:
                self._named.add(text)
                logger.warning("image left out: %s", text)
        if delivery.error or delivery.batch is None:
            raise DataError(delivery.error)
        for kind, count in delivery.counts.items():
            if count and not self.counters[kind]:
                name = self._stream.dataset.annotations
                logger.warning("%s: %s (counted as %s from here on)", name, _EXPLAIN[kind], kind)
            self.counters[kind] += count
        return delivery.batch

    def _next_delivery(self) -> Delivery:
        """Return the workers' next delivery. If one has died, all are restarted; no sample is lost.

        Raises RuntimeError after MAX_RESTARTS restarts.
        """
        while True:
            try:
                delivery = next(self._deliveries)
                self._delivered += 1
                return delivery
            except (ConnectionError, EOFError, RuntimeError) as error:
                # ConnectionError, EOFError: a worker died while it sent a batch. Else torch's RuntimeError.
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                if self._restarts == MAX_RESTARTS:
                    raise RuntimeError(
                        f"data loader workers died {MAX_RESTARTS + 1} times; if memory ran out, set fewer "
                        "data.workers"
                    ) from error
                self._restarts += 1
                self.counters["worker_restarts"] += 1
                logger.warning("a data loader worker died (%s): all are restarted", str(error).split("\n")[0])
                _end(self._deliveries)
                self._start()

    def close(self) -> None:
        """End the workers. Dropping the last reference does the same."""
        deliveries, self._deliveries = self._deliveries, iter(())
        _end(deliveries)


def train_loader(
    dataset: Dataset,
    config: DataConfig,
    batch: int,
    rank: int = 0,
    world: int = 1,
    start_micro_step: int = 0,
    seed: int = 0,
    pin_memory: bool = False,
    targets: frozenset[str] = BOXES_AND_MASKS,
) -> Loader:
    """Return the endless training batches of one rank, from micro-step `start_micro_step` on.

    Only the given `targets` ("boxes", "masks", "semantic") are made: without masks S is 0. Raises `DataError`
    if there is nothing to train on, or, while iterating, if `MAX_BAD_IN_A_ROW` images in a row
    cannot be used.
    """
    stream = TrainStream(dataset, config, seed, targets)
    return Loader(stream, RankSampler(batch, rank, world, start_micro_step), pin_memory)


def eval_loader(
    dataset: Dataset,
    config: DataConfig,
    batch: int,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
    targets: frozenset[str] = frozenset(),
) -> Loader:
    """Return a loader of every image once over all ranks, in `loader.steps` batches on each rank.

    Filler slots hold a black image of the canvas' size with the id -1; so do unreadable images, which
    therefore count as missed. Without `targets`, M and S are 0: the ground truth of an evaluation is the
    annotation file.
    """
    steps = -(-len(dataset) // (batch * world))
    stream = EvalStream(dataset, config, targets)
    return Loader(stream, RankSampler(batch, rank, world, 0, steps), pin_memory)


def _as_is(delivery: Any) -> Any:
    return delivery


def _init_worker(worker: int) -> None:
    """Ignore stop signals, which the training loop handles; workers end with their loader."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
