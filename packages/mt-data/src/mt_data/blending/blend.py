"""Mixing datasets: which dataset serves sample i, and which of its samples (docs/specs/data.md §4.12)."""

from collections.abc import Mapping, Sequence

import numpy as np

from mt_core.contracts import Dataset
from mt_core.errors import MtError
from mt_data.blending.interleave import interleave

LARGEST_BLEND = 32_766


class BlendedDataset:
    """Samples of several datasets, interleaved as the two index arrays say."""

    def __init__(self, datasets: Sequence[Dataset], dataset_index: np.ndarray, sample_index: np.ndarray) -> None:
        self._datasets, self._dataset_index, self._sample_index = datasets, dataset_index, sample_index

    def __len__(self) -> int:
        return len(self._dataset_index)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray | np.generic]:
        """The sample of the dataset whose turn it is, and `dataset_id` int16, the dataset's number."""
        number = self._dataset_index[index]
        return {"dataset_id": number, **self._datasets[int(number)][int(self._sample_index[index])]}


def blend_by_weights(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Interleave so that after every sample each dataset is as near its share as it can be.

    Each turn goes to the dataset that lags furthest behind its weight, the first of equals. Returns the dataset
    (int16) and its own sample number (int64) of every position.
    """
    return interleave(_normalise_weights(weights), size)


def blend_exhaustively(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """`blend_by_weights` with the sizes as weights, where each dataset leaves when all its samples are out."""
    return interleave(_normalise_weights(sizes), sum(sizes), limits=np.asarray(sizes, np.float64))


def _normalise_weights(weights: Sequence[float]) -> np.ndarray:
    if len(weights) > LARGEST_BLEND:
        raise MtError("data.paths", f"blends {len(weights)} datasets", f"at most {LARGEST_BLEND}")
    if (smallest := min(weights)) <= 0:
        raise MtError(
            "data.paths",
            f"dataset {list(weights).index(smallest)} of the blend has no samples or weight",
            "leave it out, or give every path a weight",
        )
    values = np.asarray(weights, np.float64)
    return values / np.sum(values)
