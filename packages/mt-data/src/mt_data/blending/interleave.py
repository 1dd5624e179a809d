"""The greedy order of a blend, for many samples at once, equal to the one-sample-at-a-time rule bit for bit.

The rule (docs/specs/data.md §4.12): sample i goes to the dataset with the largest `w · max(i, 1) - c` in float64, the
first of equals, where c counts the samples that the dataset has given. Each turn depends on the one before, but little:
two runs of the rule that differ in a few counts draw together, since no turn widens their distance (sum of |c - c'|)
and every turn in which they choose differently tends to narrow it. So the order is cut into chunks that run side by
side, each from counts guessed for its start and a warm-up; then the guess of every chunk is compared with how the
one before it ended, and chunks that began wrongly run again from there. When all starts equal the ends before them,
the whole is what one long run gives, by induction, and it is only then returned.
"""

import numpy as np

LANES = 1 << 16
"""Counts that one step updates over all chunks: two such float64 arrays stay in a core's cache."""
SHORTEST_CHUNK = 256
EXHAUSTED = float(1 << 60)
"""Samples counted for a dataset that has left: it never lags again."""
WARM_UP = 8
"""The warm-up is a chunk's length divided by this."""


def interleave(weights: np.ndarray, size: int, *, limits: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Dataset of each of `size` samples, int16 [size], and its own number in that dataset, int64 [size].

    Parameters: `weights` float64 [K], normalised; `limits` float64 [K], the samples after which a dataset leaves.
    """
    chunks = max(1, min(LANES // len(weights), size // SHORTEST_CHUNK))
    length = -(-size // chunks) if size else 0
    firsts = np.arange(chunks) * length
    lead = np.minimum(firsts, length // WARM_UP)
    counts = np.stack([_guess_counts(weights, first, limits) for first in (firsts - lead).tolist()])
    if lead.any():
        _interleave_chunks(weights, counts[1:], (firsts - lead)[1:], int(lead.max()), limits)
    dataset, sample = np.empty((chunks, length), np.int16), np.empty((chunks, length), np.int64)
    starts = counts.copy()
    wrong = np.arange(chunks)
    while len(wrong):
        ends = starts[wrong]
        dataset[wrong], sample[wrong] = _interleave_chunks(weights, ends, firsts[wrong], length, limits)
        counts[wrong] = ends
        wrong = 1 + np.flatnonzero((starts[1:] != counts[:-1]).any(axis=1))
        starts[wrong] = counts[wrong - 1]
    return dataset.reshape(-1)[:size], sample.reshape(-1)[:size]


def _guess_counts(weights: np.ndarray, turn: int, limits: np.ndarray | None) -> np.ndarray:
    """Counts near those before a turn: every share rounded down, and up for the largest remainders."""
    shares = weights * turn
    counts = np.floor(shares)
    missing = max(0, turn - int(counts.sum()))
    counts[np.argsort(counts - shares, kind="stable")[:missing]] += 1
    if limits is not None:
        counts[counts >= limits] = EXHAUSTED
    return counts


def _interleave_chunks(
    weights: np.ndarray, counts: np.ndarray, firsts: np.ndarray, steps: int, limits: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The rule for `steps` turns of every chunk, two [chunks, steps]; `counts` [chunks, K] is updated in place."""
    chunks, datasets = counts.shape
    dataset, sample = np.empty((steps, chunks), np.int16), np.empty((steps, chunks), np.int64)
    flat, rows = counts.reshape(-1), np.arange(chunks) * datasets
    lag, tiled = np.empty_like(counts), np.tile(weights, (chunks, 1))
    for step in range(steps):
        lag[:] = np.maximum(firsts + step, 1)[:, None]
        lag *= tiled  # one flat product: broadcasting the turns inside it would take twice as long
        lag -= counts
        best = lag.argmax(axis=1)
        place = rows + best
        given = flat[place]
        dataset[step], sample[step] = best, given
        given += 1
        if limits is not None:
            given[given >= limits[best]] = EXHAUSTED
        flat[place] = given
    return dataset.T, sample.T
