"""Mixing datasets: which dataset serves sample i, and which of its samples (spec/data.md §4.12)."""

from collections.abc import Mapping, Sequence

import numpy as np

from mt_core.errors import MtError
from mt_core.types import Dataset

LARGEST_BLEND = 32_766


class BlendedDataset:
    """Samples of several datasets, interleaved as the two index arrays say."""

    def __init__(self, datasets: Sequence[Dataset], dataset_index: np.ndarray, sample_index: np.ndarray) -> None:
        self._datasets, self._dataset_index, self._sample_index = datasets, dataset_index, sample_index

    def __len__(self) -> int:
        return len(self._dataset_index)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        """The sample of the dataset whose turn it is."""
        return self._datasets[int(self._dataset_index[index])][int(self._sample_index[index])]


def sized_blend(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Interleave so that after every sample each dataset is as near its share as it can be.

    Each turn goes to the dataset that lags furthest behind its weight, the first of equals. Returns the dataset
    (int16) and its own sample number (int64) of every position.
    """
    return _interleave(_normalised(weights), size, limits=None)


def exhaustive_blend(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """`sized_blend` with the sizes as weights, where each dataset leaves when all its samples are out."""
    return _interleave(_normalised(sizes), sum(sizes), limits=sizes)


def _normalised(weights: Sequence[float]) -> list[float]:
    if len(weights) > LARGEST_BLEND:
        raise MtError("data.paths", f"blends {len(weights)} datasets", f"at most {LARGEST_BLEND}")
    if (smallest := min(weights)) <= 0:
        raise MtError(
            "data.paths",
            f"dataset {list(weights).index(smallest)} of the blend has no samples or weight",
            "leave it out, or give every path a weight",
        )
    values = np.asarray(weights, np.float64)
    return (values / np.sum(values)).tolist()


def _interleave(weights: list[float], size: int, *, limits: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """The greedy loop, in Python floats: for the few datasets of a blend it is faster than numpy's argmax."""
    dataset_index, sample_index = np.empty(size, np.int16), np.empty(size, np.int64)
    counts = [0] * len(weights)
    open_datasets = list(range(len(weights)))
    for i in range(size):
        due = max(i, 1)
        chosen = max(open_datasets, key=lambda k: weights[k] * due - counts[k])
        dataset_index[i], sample_index[i] = chosen, counts[chosen]
        counts[chosen] += 1
        if limits is not None and counts[chosen] == limits[chosen]:
            open_datasets.remove(chosen)
    return dataset_index, sample_index
