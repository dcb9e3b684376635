"""The streams of samples: which image and view sample k is. Workers make batches of them.

Nothing is dropped silently: what is left out is counted in the deliveries.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset

from giantdet.config.types import DataConfig
from giantdet.data.dataset import Dataset, nothing_to_train
from giantdet.data.images import limit_pixels
from giantdet.data.samples import NO_MAP, Sample, collate, make_sample
from giantdet.data.sampling import Repeats, repeat_factors
from giantdet.data.transforms import Geometry, draw_geometry, window_row, windows
from giantdet.errors import DataError
from giantdet.structures import IGNORE, Batch

MAX_BAD_IN_A_ROW = 50
BOXES_AND_MASKS = frozenset({"boxes", "masks"})
_AUGMENT = 1  # second word of the augmentation's seeds; the permutations use 0, data/sampling.py 2


class Delivery(NamedTuple):
    """The message of a worker. An error is sent as text: torch wraps a worker's exceptions in a traceback."""

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


class Stream(TorchDataset[Sample]):
    """Base of both streams: turns lists of sample numbers into deliveries."""

    def __init__(self, dataset: Dataset, config: DataConfig, targets: frozenset[str]) -> None:
        self.dataset, self.config, self.targets = dataset, config, targets
        self.side = config.mask_frame if "masks" in targets else 0

    def __getitem__(self, k: int) -> Sample:
        raise NotImplementedError

    def __getitems__(self, numbers: list[int]) -> Delivery:
        """Make the delivery of one batch's sample numbers; called by torch's fetcher."""
        limit_pixels(self.config.max_image_pixels)  # here, in the worker that reads
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


class TrainStream(Stream):
    """The training stream; the module's docstring defines sample k."""

    def __init__(
        self, dataset: Dataset, config: DataConfig, seed: int, targets: frozenset[str] = BOXES_AND_MASKS
    ) -> None:
        super().__init__(dataset, config, targets)
        self.seed = seed
        self.indices = dataset.training_indices(config.filter_empty)
        if len(self.indices) == 0 or ("boxes" in targets and not dataset.summary().objects):
            raise nothing_to_train(dataset)
        self.factors = repeat_factors(dataset, self.indices, config)
        self._repeats = None if self.factors is None else Repeats(self.factors, seed)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    def image(self, k: int) -> int:
        """Return the index in the data set of the image that sample k is."""
        chosen = sample_index(k, len(self), self.seed) if self._repeats is None else self._repeats[k]
        return int(self.indices[chosen])

    def __getitem__(self, k: int) -> Sample:
        """Return sample k. The image of k + 1, k + 2, ... replaces a bad one, with k's random numbers."""
        bad: list[str] = []
        for j in range(k, k + MAX_BAD_IN_A_ROW):
            i = self.image(j)
            height, width = self.dataset.sizes_hw[i]
            rng = np.random.default_rng((self.seed % 2**63, _AUGMENT, k))
            geometry = draw_geometry(rng, (int(height), int(width)), self.config, training=True)
            try:
                sample = make_sample(self.dataset, i, k, self.config, geometry, self.targets, rng)
            except DataError as error:
                path = str(self.dataset.path(i))
                bad.append(str(error) if path in str(error) else f"{path}: {error}")
                continue
            return sample._replace(counts=sample.counts | {"replaced_images": len(bad)}, bad=tuple(bad))
        # If the whole data set is bad, all ranks name the same example, and the error is printed once.
        annotations = self.dataset.annotations
        raise DataError(f"{annotations}: {MAX_BAD_IN_A_ROW} images in a row cannot be used, e.g. {min(bad)}")


class EvalStream(Stream):
    """The evaluation stream: sample k is view k; numbers beyond the views fill up the last batches.

    A view is an image on the canvas, or one of the windows over it where `window_stride` is given, or, if
    `unscaled`, the image as it is in the file.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        targets: frozenset[str],
        window_stride: int | None = None,
        unscaled: bool = False,
    ) -> None:
        super().__init__(dataset, config, targets)
        self.window_stride, self.unscaled = window_stride, unscaled
        sizes = [(int(height), int(width)) for height, width in dataset.sizes_hw]
        counts = [1 if window_stride is None else len(windows(hw, config, window_stride)) for hw in sizes]
        self.first = np.concatenate([[0], np.cumsum(counts)])  # view of each image

    def __getitem__(self, k: int) -> Sample:
        if k >= self.first[-1]:
            return self._nothing(k)
        i = int(np.searchsorted(self.first, k, side="right")) - 1
        hw = (int(self.dataset.sizes_hw[i, 0]), int(self.dataset.sizes_hw[i, 1]))
        try:
            if self.unscaled:
                config = self.config.model_copy(update={"size": hw})
                as_is = Geometry(hw, hw, (0, 0), hw, False)
                return make_sample(self.dataset, i, k, config, as_is, self.targets)
            if self.window_stride is None:
                geometry = draw_geometry(np.random.default_rng(0), hw, self.config, training=False)
                return make_sample(self.dataset, i, k, self.config, geometry, self.targets)
            views, number = windows(hw, self.config, self.window_stride), k - int(self.first[i])
            sample = make_sample(self.dataset, i, k, self.config, views[number], self.targets)
            return sample._replace(window=window_row(views, number))
        except DataError as error:
            return self._nothing(k)._replace(counts={"unreadable_images": 1}, bad=(str(error),))

    def batches(self, batch: int, rank: int, world: int) -> list[list[int]]:
        """Return the sample numbers of one rank's batches, as many batches on each rank.

        The windows of an image belong to one rank, in order.
        """
        total = int(self.first[-1])
        if self.window_stride is None:
            steps = range(-(-total // (batch * world)))
            return [list(range((s * world + rank) * batch, (s * world + rank + 1) * batch)) for s in steps]
        mine = [
            [k for i in range(r, len(self.dataset), world) for k in range(self.first[i], self.first[i + 1])]
            for r in range(world)
        ]
        length = -(-max(map(len, mine)) // batch) * batch
        padded = mine[rank] + [total] * (length - len(mine[rank]))
        return [padded[start : start + batch] for start in range(0, length, batch)]

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
            np.full(size, IGNORE, np.uint8) if self.targets & {"semantic", "ignored"} else NO_MAP,
            None if self.window_stride is None else (0, 0, *size, 0, 1),
        )
