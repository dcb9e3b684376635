"""Load images into batches of fixed shape, in an order that a run can resume at any step.

The training stream is an endless sequence of samples k = 0, 1, 2, ... Sample k is a pure function of
(seed, k): which image, how it is scaled and flipped. Micro-step t of rank r of W with B images per
micro-batch holds the samples [(t W + r) B, (t W + r) B + B). So the stream is the same for any number of
workers, ranks of equal W x B see the same global batches, and seeking is free.

Nothing is dropped silently: objects beyond the M slots, objects below a pixel and unreadable images are
counted in `Loader.counters`, and named in warnings of the logger "giantdet".
"""

from __future__ import annotations

import atexit
import itertools
import mmap
import re
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from multiprocessing.context import ForkContext
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from giantdet.config.types import DataConfig
from giantdet.data.dataset import Dataset
from giantdet.data.records import logger
from giantdet.data.streams import BOXES_AND_MASKS, Delivery, EvalStream, Stream, TrainStream
from giantdet.errors import DataError
from giantdet.structures import Batch

MAX_RESTARTS = 3
_WORKER_DIED = re.compile("DataLoader worker|Pin memory thread exited")  # in torch's messages
_EXPLAIN = {
    "dropped_objects": "objects beyond max_objects, the smallest of each image, are left out",
    "tiny_objects": "objects narrower than a pixel after scaling are left out",
    "replaced_images": "images that cannot be used were replaced by the next ones in the stream",
    "unreadable_images": "images that cannot be used are evaluated as images without detections",
    "worker_restarts": "workers that died were restarted",
}


class TrainSampler(Sampler[list[int]]):
    """Yields the sample numbers of one rank's micro-batches without end, from micro-step `start` on."""

    def __init__(self, batch: int, rank: int, world: int, start: int = 0) -> None:
        self.batch, self.rank, self.world, self.start = batch, rank, world, start

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.start):
            first = (step * self.world + self.rank) * self.batch
            yield list(range(first, first + self.batch))

    def after(self, delivered: int) -> TrainSampler:
        """Return the sampler of what follows the first `delivered` batches."""
        return TrainSampler(self.batch, self.rank, self.world, self.start + delivered)


class EvalSampler(Sampler[list[int]]):
    """Yields lists of sample numbers."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def after(self, delivered: int) -> EvalSampler:
        """Return the sampler of what follows the first `delivered` batches."""
        return EvalSampler(self.batches[delivered:])


class EndFlag:
    """The part of `multiprocessing.Event` that torch's workers poll, without its lock.

    A worker that is killed while it holds the lock, for example when memory runs out, never releases it, and
    the training would wait for it for ever. Reading or writing a byte needs no lock.
    """

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)  # shared with the processes that are forked later

    def is_set(self) -> bool:
        return self._byte[0] == 1

    def set(self) -> None:
        self._byte[0] = 1


class _Fork(ForkContext):
    """Starts workers by fork, the only method by which they inherit an `EndFlag`."""

    def Event(self) -> EndFlag:  # type: ignore[override]
        return EndFlag()


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

    def __init__(self, stream: Stream, sampler: TrainSampler | EvalSampler, pin_memory: bool) -> None:
        self.counters: Counter[str] = Counter(dict.fromkeys(_EXPLAIN, 0))
        self.steps = len(sampler.batches) if isinstance(sampler, EvalSampler) else None
        self._stream, self._sampler, self._pin_memory = stream, sampler, pin_memory
        self._named: set[str] = set()
        self._delivered = self._restarts = 0
        self._start()

    def _start(self) -> None:
        """Make torch's iterator, from the first batch that was not delivered yet."""
        self._deliveries: Iterator[Delivery] = iter(
            DataLoader(
                self._stream,
                batch_sampler=self._sampler.after(self._delivered),
                num_workers=self._stream.config.workers,
                multiprocessing_context=_Fork() if self._stream.config.workers else None,
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
                # ConnectionError, EOFError: a worker died while it sent a batch. With pinned memory they end
                # torch's thread that pins it. Otherwise torch raises RuntimeError.
                if isinstance(error, RuntimeError) and not _WORKER_DIED.search(str(error)):
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

    Only the given `targets` ("boxes", "masks", "semantic", "ignored") are made: without masks S is 0. Raises
    `DataError` if there is nothing to train on, or, while iterating, if 50 images in a row cannot be used.
    """
    stream = TrainStream(dataset, config, seed, targets)
    return Loader(stream, TrainSampler(batch, rank, world, start_micro_step), pin_memory)


def eval_loader(
    dataset: Dataset,
    config: DataConfig,
    batch: int,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
    targets: frozenset[str] = frozenset(),
    window_stride: int | None = None,
    unscaled: bool = False,
) -> Loader:
    """Return a loader of every image once over all ranks, in `loader.steps` batches on each rank.

    With `window_stride` images are seen in windows of the canvas' size, all those of an image on one rank.
    With `unscaled`, for a batch of 1, an image keeps its size, and has no padding.

    Filler slots hold a black image of the canvas' size with the id -1; so do unreadable images, which
    therefore count as missed. Without `targets`, M and S are 0: the ground truth of an evaluation is the
    annotation file.
    """
    stream = EvalStream(dataset, config, targets, window_stride, unscaled)
    return Loader(stream, EvalSampler(stream.batches(batch, rank, world)), pin_memory)


def _as_is(delivery: Any) -> Any:
    return delivery


def _init_worker(worker: int) -> None:
    """Ignore stop signals, which the training loop handles; workers end with their loader."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
