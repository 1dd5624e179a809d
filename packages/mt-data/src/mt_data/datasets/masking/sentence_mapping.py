"""Which sentences make up sample i of BERT, T5 and ICT, in Megatron's order (docs/specs/data.md §5.1.1, §5.4).

A document's sentences are gathered until they reach a target length. For BERT and T5 a random number decides each
target, and how many are drawn depends on where all samples before ended, so samples are gathered one after the other;
where a sample that begins at a sentence ends is looked up in a table made for all sentences at once.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mt_data.datasets.masking.mersenne import draw_mt19937, draw_mt19937_64

LONGEST_SENTENCE = 512
"""A document with a sentence of more tokens is left out; BERT and T5 keep it if that is its only one."""


@dataclass(frozen=True, slots=True)
class SentenceSampling:
    """What determines a mapping, apart from the sentences."""

    max_length: int
    """Target length of a sample in tokens."""
    min_sentences: int
    """Fewer are not enough for a sample."""
    short_prob: float
    """How often a target is short."""
    seed: int
    samples: int | None
    """Whole epochs until there are as many; None: one epoch."""


@dataclass(frozen=True, slots=True)
class Sentences:
    """The sentences of a corpus and its documents in a split."""

    lengths: np.ndarray
    """Tokens of every sentence, int32 [S]."""
    documents: np.ndarray
    """Bounds of the split's documents, int64 [D + 1]."""

    def usable_documents(self, min_sentences: int, *, single_long: bool) -> np.ndarray:
        """Numbers of the documents that give samples: enough sentences, none too long but a `single_long` one."""
        long = np.concatenate(([0], np.cumsum(self.lengths > LONGEST_SENTENCE)))
        sentences = np.diff(self.documents)
        too_long = long[self.documents[1:]] > long[self.documents[:-1]]
        return np.flatnonzero(
            (sentences >= max(min_sentences, 1)) & ~(too_long & ((sentences > 1) | (not single_long)))
        )


def build_sentence_mapping(sentences: Sentences, sampling: SentenceSampling) -> np.ndarray:
    """Rows of (first sentence, behind the last, target length), uint32 [n, 3], shuffled."""
    used = sentences.usable_documents(sampling.min_sentences, single_long=True)
    bounds = list(zip(sentences.documents[used].tolist(), sentences.documents[used + 1].tolist(), strict=True))
    ends = _SampleEnds(sentences, used, sampling.min_sentences, rest=2)
    whole = ends.table(np.int64(sampling.max_length)).tolist()
    targets = _draw_targets(sampling)
    rows: list[tuple[int, int, int]] = []
    while bounds and (not rows or (sampling.samples is not None and len(rows) < sampling.samples)):
        for start, stop in bounds:
            target = next(targets)
            while start < stop:
                end = whole[start] if target == sampling.max_length else ends.find(start, stop, target)
                rows.append((start, end, target))
                start, target = end, next(targets)
    return shuffle_rows(np.array(rows, np.int64).reshape(-1, 3), sampling.seed, len(sentences.lengths))


def build_block_mapping(sentences: Sentences, title_lengths: np.ndarray, sampling: SentenceSampling) -> np.ndarray:
    """Rows of (first sentence, behind the last, document, block), uint32 [n, 4], shuffled; nothing else is random.

    Parameters: `title_lengths` int [D], which each document's target is shorter by. Documents are those of the split,
    from 0 on; blocks count from 0 in each epoch.
    """
    used = sentences.usable_documents(sampling.min_sentences, single_long=False)
    sizes = np.diff(sentences.documents)
    target = np.zeros(len(sentences.lengths), np.int64)
    inside = slice(int(sentences.documents[0]), int(sentences.documents[-1]))
    target[inside] = np.repeat(sampling.max_length - title_lengths, sizes)
    minimum = sampling.min_sentences
    ends = _SampleEnds(sentences, used, minimum, rest=minimum).table(target).tolist()
    rows: list[tuple[int, int, int, int]] = []
    for document in used.tolist():
        start, stop = sentences.documents[document : document + 2].tolist()
        while start < stop:
            rows.append((start, ends[start], document, len(rows)))
            start = ends[start]
    epochs = 1 if sampling.samples is None or not rows else max(1, -(-sampling.samples // len(rows)))
    all_rows = np.tile(np.array(rows, np.int64).reshape(-1, 4), (epochs, 1))
    return shuffle_rows(all_rows, sampling.seed, len(sentences.lengths))


def shuffle_rows(rows: np.ndarray, seed: int, sentences: int) -> np.ndarray:
    """The rows in the order that swapping from the last one down gives, with `std::mt19937_64(seed + 1)`."""
    order = list(range(len(rows)))
    partners = draw_mt19937_64(seed + 1, max(0, len(rows) - 1)) % np.arange(len(rows), 1, -1, dtype=np.uint64)
    for i, j in zip(range(len(rows) - 1, 0, -1), partners.tolist(), strict=True):
        order[i], order[j] = order[j], order[i]
    small = sentences <= np.iinfo(np.uint32).max
    return rows[order].astype(np.uint32 if small else np.uint64)


class _SampleEnds:
    """Where a sample ends that begins at a sentence.

    Behind the first sentence with which it is long enough and has enough sentences, if then `rest` sentences are left
    of the document, else with the document.
    """

    def __init__(self, sentences: Sentences, used: np.ndarray, min_sentences: int, *, rest: int) -> None:
        self._min, self._rest = min_sentences, rest
        self._before = np.concatenate(([0], np.cumsum(sentences.lengths, dtype=np.int64)))
        self._list = self._before.tolist()
        self._stops = np.zeros(len(sentences.lengths), np.int64)
        starts, stops = sentences.documents[used], sentences.documents[used + 1]
        for_all = np.repeat(stops, stops - starts)
        self._stops[_concatenate_ranges(starts, stops)] = for_all

    def table(self, target: np.ndarray | np.int64) -> np.ndarray:
        """The end for every sentence of the documents in use, int64 [S]."""
        starts = np.arange(len(self._stops))
        reached = np.searchsorted(self._before, self._before[:-1] + target, side="left")
        ends = np.maximum(reached, starts + max(self._min, 1))
        return np.where(self._stops - ends >= self._rest, ends, self._stops)

    def find(self, start: int, stop: int, target: int) -> int:
        """The end of a sample that begins at sentence `start` of a document, for any target length."""
        reached = bisect_left(self._list, self._list[start] + target, start, stop)
        end = max(reached, start + max(self._min, 1))
        return end if stop - end >= self._rest else stop


def _concatenate_ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The numbers of all ranges, one after the other."""
    sizes = stops - starts
    return np.arange(sizes.sum()) + np.repeat(starts - np.cumsum(sizes) + sizes, sizes)


def _draw_targets(sampling: SentenceSampling) -> Iterator[int]:
    """Target lengths without end: one in `1 / short_prob` is 2 to `longest`, by the number that decided it."""
    ratio, longest = round_half_up(1 / sampling.short_prob) if sampling.short_prob else 0, sampling.max_length
    while not ratio:
        yield longest
    for number in draw_mt19937(sampling.seed):
        yield 2 + number % (longest - 1) if number % ratio == 0 else longest


def round_half_up(value: float) -> int:
    """A positive number rounded, halves away from zero."""
    return int(value + 0.5)
