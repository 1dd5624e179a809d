"""`GPTDataset`: samples of L tokens and their labels, in training order (spec/data.md §4.7, §4.9)."""

from collections.abc import Mapping

import numpy as np

from mt_data.gpt.indices import EXTRA, Indices, Request, build_indices
from mt_data.index_cache import IndexCache, content_key
from mt_data.indexed.reader import IndexedReader

NAMES = ("document", "sample", "shuffle")
INDEX_VERSION = 1
"""Goes into the cache's keys; to be raised when the indexes of a request change."""


class GPTDataset:
    """Sample i of a split, cut from the stream that `Indices` describes."""

    def __init__(self, reader: IndexedReader, indices: Indices, *, seq_length: int, masked: int | None = None) -> None:
        self._reader, self._indices = reader, indices
        self._seq_length, self._masked = seq_length, masked

    def __len__(self) -> int:
        return len(self._indices.shuffle)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        """`tokens`, `labels` int64 [L] and `loss_mask` float32 [L].

        The mask is 0 where the input token is the masked id, and behind the end of a partial last sample.
        """
        stream = self._stream(int(self._indices.shuffle[index]))
        padded = np.zeros(self._seq_length + EXTRA, np.int64)
        padded[: len(stream)] = stream
        tokens, labels = padded[:-1], padded[1:]
        loss_mask = np.zeros(self._seq_length, np.float32)
        loss_mask[: len(stream) - EXTRA] = 1.0
        if self._masked is not None:
            loss_mask[tokens == self._masked] = 0.0
        return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}

    def _stream(self, row: int) -> np.ndarray:
        """The tokens of a sample and the one after them, from as many sequences as it takes."""
        (first, start), (last, stop) = self._indices.sample[row].tolist(), self._indices.sample[row + 1].tolist()
        pieces = []
        for position in range(first, last + 1):
            sequence = int(self._indices.document[position])
            begin = start if position == first else 0
            end = stop + EXTRA if position == last else int(self._reader.lengths[sequence])
            pieces.append(self._reader.get(sequence, begin, end - begin))
        return np.concatenate(pieces)


def gpt_dataset(reader: IndexedReader, request: Request, cache: IndexCache, *, masked: int | None = None) -> GPTDataset:
    """The dataset of a request, its indexes from the cache.

    `masked`: an input token that takes no part in the loss.
    """

    def build() -> dict[str, np.ndarray]:
        built = build_indices(reader.lengths, request)
        return {name: getattr(built, name) for name in NAMES}

    used = reader.lengths[request.sequences.start : request.sequences.stop]
    arrays = cache.arrays(content_key("gpt", INDEX_VERSION, repr(request), used), NAMES, build)
    return GPTDataset(reader, Indices(*arrays), seq_length=request.seq_length, masked=masked)
