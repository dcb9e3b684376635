"""How often each training image is seen: by the rarity of its classes, and by the weight of its data set.

Both are repeat factors: in each epoch an image with factor r is seen floor(r) times, and once more with the
probability r - floor(r). Which images are is a pure function of seed, epoch and image, and their order one of
seed and epoch. So sample k is a pure function of (seed, k) here too, and a run resumes at any step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from giantdet.config.datasets import sections
from giantdet.config.types import DataConfig
from giantdet.data.joined import JoinedDataset
from giantdet.errors import DataError

if TYPE_CHECKING:
    from giantdet.data.dataset import Dataset

Factors = NDArray[np.float64]
_PERMUTATION, _REPEATS = 0, 2  # second words of the seeds; 1 is the augmentation's, in data/streams.py


def class_factors(labels: Iterable[NDArray[np.int64]], threshold: float) -> Factors:
    """Return the repeat factor of each image, from the labels of its objects (Gupta et al. 2019, LVIS).

    A class that is in a share f of the images has the factor max(1, sqrt(threshold / f)), an image the
    largest of its classes', or 1 without objects.
    """
    images = [np.unique(of_image) for of_image in labels]
    if not any(len(classes) for classes in images):
        return np.ones(len(images))
    counts = np.bincount(np.concatenate(images))
    share = np.maximum(counts, 1) / len(images)
    of_class = np.maximum(1.0, np.sqrt(threshold / share))
    return np.array([of_class[classes].max(initial=1.0) for classes in images])


def weighted(factors: Factors, parts: NDArray[np.int64], weights: NDArray[np.float64]) -> Factors:
    """Return the factors scaled so that each part has its weight's share of the samples.

    factors, parts: of each image, its repeat factor and the number of its data set. The sum of all
    factors, the expected number of samples in an epoch, stays; so do the ratios inside each part.
    """
    sums = np.bincount(parts, factors, len(weights))
    scales: Factors = weights / weights.sum() * factors.sum() / sums
    return factors * scales[parts]


class Repeats:
    """The endless order of samples, epoch after epoch, by the images' repeat factors.

    An epoch's length is the number of its samples, about the sum of the factors. Finding sample k takes a
    pass over the images for each epoch before it, once.
    """

    def __init__(self, factors: Factors, seed: int) -> None:
        self.factors, self.seed = factors, seed % 2**63
        self._ends: list[int] = []
        self._latest: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def __getitem__(self, k: int) -> int:
        """Return the image that sample k is."""
        while not self._ends or self._ends[-1] <= k:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + int(self._counts(len(self._ends)).sum()))
        epoch = int(np.searchsorted(self._ends, k, side="right"))
        if self._latest[0] != epoch:
            self._latest = epoch, self._order(epoch)
        return int(self._latest[1][k - (self._ends[epoch - 1] if epoch else 0)])

    def _counts(self, epoch: int) -> NDArray[np.int64]:
        """Return how often each image is seen in an epoch."""
        drawn = np.random.default_rng((self.seed, _REPEATS, epoch)).random(len(self.factors))
        whole = np.floor(self.factors)
        return (whole + (drawn < self.factors - whole)).astype(np.int64)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        images = np.repeat(np.arange(len(self.factors)), self._counts(epoch))
        rng = np.random.default_rng((self.seed, _PERMUTATION, epoch))
        return images[rng.permutation(len(images))]


def repeat_factors(dataset: Dataset, indices: NDArray[np.int64], config: DataConfig) -> Factors | None:
    """Return the repeat factors of the training images `indices`; None: each is seen once per epoch.

    Raises DataError for classes' factors without objects, and for a data set with a weight and no image.
    """
    found = None
    if config.sampling.type == "repeat_factor":
        if not dataset.classes.objects:
            raise DataError(
                f'{dataset.annotations}: giantdet.data.sampling.type "repeat_factor" counts objects, and '
                "there are none; leave it out"
            )
        labels = (dataset.objects(int(i)).labels_N for i in indices)
        found = class_factors(labels, config.sampling.threshold)
    weights = [] if config.train is None else [section.weight for _, section in sections(config.train)]
    if not isinstance(dataset, JoinedDataset) or None in weights or not weights:
        return found
    parts = _parts(dataset, indices)
    numbers = np.bincount(parts, minlength=len(weights))
    if not numbers.all():
        empty = dataset.parts[int(numbers.argmin())].annotations
        raise DataError(
            f"{empty}: giantdet.data.train gives it a weight, but no image has an object; leave it out"
        )
    found = np.ones(len(indices)) if found is None else found
    return weighted(found, parts, np.array(weights, np.float64))


def sampling_text(dataset: Dataset, config: DataConfig) -> str:
    """Return how often images are seen, as lines with line breaks; empty where it is once per epoch."""
    indices = dataset.training_indices(config.filter_empty)
    factors = repeat_factors(dataset, indices, config)
    if factors is None:
        return ""
    lines = [
        f"sampling: an image is seen {factors.min():.3g} to {factors.max():.3g} times per epoch, on average "
        f"{factors.mean():.3g}; {np.count_nonzero(factors > 1):,} of {len(factors):,} images more than once\n"
    ]
    if isinstance(dataset, JoinedDataset):
        shares = np.bincount(_parts(dataset, indices), factors, len(dataset.parts)) / factors.sum()
        lines += [
            f"  {share:.1%} of the samples from {part.annotations}\n"
            for share, part in zip(shares, dataset.parts, strict=True)
        ]
    return "".join(lines)


def _parts(dataset: JoinedDataset, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of the data set that each image is from."""
    return np.searchsorted(dataset.start, indices, side="right") - 1
