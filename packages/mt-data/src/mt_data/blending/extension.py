"""Datasets of a run whose plan grew: the samples planned first stay as they are, what is wanted beyond them follows.

A dataset's order depends on how many epochs it was built for, so asking for more samples would shuffle those that are
trained already among the others. Instead a run keeps its plan, the numbers of samples wanted so far, each larger than
the one before; what a later number wants beyond the datasets before is a dataset of its own, with its own order.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from mt_core.contracts import Dataset

NumSamples = int | None
"""Number of samples: 0 for no dataset, None for one epoch of what there is."""

PlannedSamples = NumSamples | tuple[int, ...]
"""Number of samples, or the growing numbers of a run whose plan changed."""


@dataclass(frozen=True, slots=True)
class Extension:
    """Which of the datasets of a growing plan one is."""

    number: int = 0
    """0 for the samples planned first."""
    begin: int = 0
    """Samples in the datasets before it."""

    def derive_seed(self, seed: int) -> int:
        """The seed of the dataset's order: `seed` itself for the samples planned first, then others below 2^32."""
        if not self.number:
            return seed
        digest = hashlib.blake2b(f"{seed}/extension/{self.number}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little")


class ExtendedDataset:
    """Datasets one after the other."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._datasets = datasets
        self._ends = [*accumulate(map(len, datasets))]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray | np.generic]:
        """Sample `index`, counted over all datasets."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return self._datasets[number][index - (self._ends[number - 1] if number else 0)]


def extend_dataset(samples: PlannedSamples, build: Callable[[NumSamples, Extension], Dataset]) -> Dataset:
    """The dataset of a plan, each part of which `build(samples, extension)` makes with at least so many samples."""
    if not isinstance(samples, tuple):
        return build(samples, Extension())
    datasets = [build(samples[0], Extension())]
    for number, wanted in enumerate(samples[1:], 1):
        begin = sum(map(len, datasets))
        if wanted > begin:
            datasets.append(build(wanted - begin, Extension(number, begin)))
    return datasets[0] if len(datasets) == 1 else ExtendedDataset(datasets)


def get_last(samples: PlannedSamples) -> NumSamples:
    """The number of samples that a plan has come to."""
    return samples[-1] if isinstance(samples, tuple) else samples
