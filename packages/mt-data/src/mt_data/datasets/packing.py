"""Several documents in one sample: where each begins, in the form that attention kernels take."""

from collections.abc import Sequence

import numpy as np


def document_bounds(lengths: Sequence[int] | np.ndarray, seq_length: int) -> dict[str, np.ndarray | np.generic]:
    """`cu_seqlens` int32 [T + 1]: 0 and the running sum of the parts' lengths, filled up with T; `max_seqlen` int32.

    Parts of length 0 are left out. The lengths add up to T.
    """
    parts = np.asarray(lengths)
    parts = parts[parts > 0]
    assert parts.sum() == seq_length, "the parts fill the sample"
    bounds = np.full(seq_length + 1, seq_length, np.int32)
    bounds[0] = 0
    np.cumsum(parts, out=bounds[1 : len(parts) + 1])
    return {"cu_seqlens": bounds, "max_seqlen": np.int32(parts.max())}


def positions(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """0, 1, 2, … in each part, int64."""
    parts = np.asarray(lengths)
    return np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
