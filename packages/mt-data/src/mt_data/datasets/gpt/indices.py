"""Which tokens make up sample i: the document, sample and shuffle index (docs/specs/data.md §4.4 to §4.6), in numpy.

All sequences of a split, shuffled once per epoch, form one long stream; sample k starts at its token k · L. One
`RandomState(seed)` makes the document index first and the shuffle index second, so both orders equal Megatron's.
"""

from dataclasses import dataclass

import numpy as np

from mt_core.errors import MtError

EXTRA_TOKENS = 1
"""A sample draws L + 1 tokens: labels are the tokens shifted by one."""
ROWS = 1 << 20
"""Rows of the sample index that are made at a time."""
LAST_EPOCH_SHARE = 0.80
"""A last epoch of which less than this share is needed is shuffled by itself."""


@dataclass(frozen=True, slots=True)
class IndexRequest:
    """What determines the three indexes, apart from the sequences' lengths."""

    sequences: range
    """Sequence numbers of the split."""
    samples: int | None
    """Number of samples; None for one epoch."""
    seq_length: int
    """Tokens in a sample, L."""
    seed: int
    keep_partial: bool = False
    """Keep the last sample although the stream ends inside it."""
    extra: int = EXTRA_TOKENS
    """Tokens that a sample draws beyond L; 0: the last has no label."""


@dataclass(frozen=True, slots=True)
class SampleIndices:
    """The three index arrays; n is the number of samples."""

    document: np.ndarray
    """Sequence numbers in the order of the stream, int32."""
    sample: np.ndarray
    """[n + 1, 2]: where sample k starts, as (position in `document`, token in that sequence)."""
    shuffle: np.ndarray
    """[n]: sample served at each position."""


@dataclass(frozen=True, slots=True)
class EpochCounts:
    """How often the split's sequences go into the stream."""

    count: int
    separate_last: bool
    """The last epoch is shuffled by itself, after the others."""
    samples_before_last: int


def build_indices(lengths: np.ndarray, request: IndexRequest) -> SampleIndices:
    """The indexes for a request; `lengths` int [S] are the tokens of every sequence in the file."""
    used = lengths[request.sequences.start : request.sequences.stop]
    tokens = int(used.sum(dtype=np.int64))
    epochs = plan_epochs(tokens, request)
    random = np.random.RandomState(request.seed)
    document = _build_document_index(request.sequences, epochs, random)
    sample = build_sample_index(lengths, document, request)
    return SampleIndices(document, sample, _build_shuffle_index(len(sample) - 1, epochs, random))


def plan_epochs(tokens: int, request: IndexRequest) -> EpochCounts:
    """The fewest epochs that give the samples asked for, and whether the last is shuffled separately."""
    if tokens == 0:
        raise MtError(
            "data.split", f"{len(request.sequences)} sequences without tokens give no samples", "choose another split"
        )
    if request.samples is None:
        return EpochCounts(1, separate_last=False, samples_before_last=0)
    length, extra = request.seq_length, request.extra
    count = max(1, -(-(request.samples * length + extra) // tokens))
    before = ((count - 1) * tokens - extra) // length
    per_epoch = (tokens - extra) // length
    from_last = request.samples - before
    assert count == 1 or 0 <= from_last <= per_epoch + 1
    return EpochCounts(count, count > 1 and from_last < int(LAST_EPOCH_SHARE * per_epoch), before)


def _build_document_index(sequences: range, epochs: EpochCounts, random: np.random.RandomState) -> np.ndarray:
    epoch = np.arange(sequences.start, sequences.stop, dtype=np.int32)
    parts = [epochs.count - 1, 1] if epochs.separate_last else [epochs.count]
    documents = [np.tile(epoch, part) for part in parts]
    for part in documents:
        random.shuffle(part)
    return np.concatenate(documents)


def build_sample_index(lengths: np.ndarray, document: np.ndarray, request: IndexRequest) -> np.ndarray:
    """Row k is the first sequence that ends beyond token k · L of the stream; without an extra token, at it or beyond.

    A partial last sample ends at the stream's last token; Megatron rounds its count in float32, which is wrong beyond
    2^24 tokens, ours is exact.
    """
    parts = lengths[document]
    ends = np.cumsum(parts, dtype=np.int64)
    length, last = request.seq_length, int(ends[-1]) - request.extra
    count = max(0, -(-last // length) if request.keep_partial else last // length)
    small = max(len(document), int(lengths.max())) <= np.iinfo(np.int32).max
    rows = np.empty((count + 1, 2), np.int32 if small else np.int64)
    for first in range(0, count + 1, ROWS):  # in pieces, for their memory
        block = rows[first : first + ROWS]
        starts = np.minimum(np.arange(first, first + len(block), dtype=np.int64) * length, last)
        position = np.searchsorted(ends, starts, side="right" if request.extra else "left")
        block[:, 0] = position
        block[:, 1] = starts - (ends[position] - parts[position])
    return rows


def _build_shuffle_index(count: int, epochs: EpochCounts, random: np.random.RandomState) -> np.ndarray:
    index = np.arange(count, dtype=np.uint32 if count < np.iinfo(np.uint32).max - 1 else np.int64)
    first = epochs.samples_before_last if epochs.separate_last else count
    random.shuffle(index[:first])
    if first < count:
        random.shuffle(index[first:])
    return index
