"""Several documents in one sample: which one each token belongs to, and its position there."""

from collections.abc import Sequence

import numpy as np


def make_segment_ids(lengths: Sequence[int] | np.ndarray, seq_length: int) -> np.ndarray:
    """The number of the part that each token of a sample belongs to, int64 [T]; parts of length 0 have no number.

    The lengths add up to T.
    """
    parts = np.asarray(lengths)
    parts = parts[parts > 0]
    assert parts.sum() == seq_length, "the parts fill the sample"
    return np.repeat(np.arange(len(parts)), parts)


def make_position_ids(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """0, 1, 2, … in each part, int64."""
    parts = np.asarray(lengths)
    return np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
