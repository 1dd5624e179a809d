"""`GPTDataset`: samples of L tokens and their labels, in training order (docs/specs/data.md §4.7, §4.9)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mt_data.gpt.indices import Indices, Request, build_indices
from mt_data.index_cache import IndexCache, content_key
from mt_data.packed import document_bounds, positions

NAMES = ("document", "sample", "shuffle")
INDEX_VERSION = 2
"""Goes into the cache's keys; to be raised when the indexes of a request change."""


class Sequences(Protocol):
    """Where tokens come from: an `IndexedReader`, or the mock corpus."""

    lengths: np.ndarray
    """Tokens of each sequence, int32 [S]."""

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of a sequence, or to its end."""
        ...


@dataclass(frozen=True, slots=True)
class Options:
    """What a sample says about the documents in it; those that are off add nothing to it."""

    eod: int = -1
    """Id that ends a document."""
    pad: int = -1
    """Id that is padding wherever it stands: no label, and 0 as a token; -1 for none."""
    eod_mask_loss: bool = False
    """An input token that ends a document takes no part in the loss."""
    reset_position_ids: bool = False
    """Add `position_ids`."""
    reset_attention_mask: bool = False
    """Add `attention_mask`."""
    inter_document_masking: bool = False
    """Add `cu_seqlens`, `max_seqlen` and `position_ids`."""


class GPTDataset:
    """Sample i of a split, cut from the stream that `Indices` describes."""

    def __init__(
        self, sequences: Sequences, indices: Indices, request: Request, options: Options | None = None
    ) -> None:
        self._sequences, self._indices = sequences, indices
        self._seq_length, self._extra = request.seq_length, request.extra
        self._options = options or Options()

    def __len__(self) -> int:
        return len(self._indices.shuffle)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray | np.generic]:
        """`tokens`, `labels` int64 [L] and `loss_mask` float32 [L], and what the options add.

        The mask is 0 where the label is padding, as behind the end of a partial last sample, and where an option says.
        """
        pieces = self.pieces(index)
        text = np.full(self._seq_length + self._extra, self._options.pad, np.int64)
        drawn = np.concatenate(pieces)
        text[: len(drawn)] = drawn
        return self.item(text, [len(piece) for piece in pieces])

    def item(self, text: np.ndarray, lengths: list[int]) -> Mapping[str, np.ndarray | np.generic]:
        """The sample that a text of L tokens and the extra one is, its documents being of the given lengths."""
        options = self._options
        if self._extra:
            tokens, labels = text[:-1], text[1:]
        else:
            tokens, labels = text, np.append(text[1:], options.pad)
        loss_mask = np.ones(self._seq_length, np.float32)
        if options.eod_mask_loss:
            loss_mask[tokens == options.eod] = 0.0
        extras = self._extras(tokens, lengths)
        if options.pad >= 0 or not self._extra or sum(lengths) < len(text):
            loss_mask[labels == options.pad] = 0.0
            labels = np.where(labels == options.pad, 0, labels)
            tokens = np.where(tokens == options.pad, 0, tokens)
        return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, **extras}

    def pieces(self, index: int) -> list[np.ndarray]:
        """The tokens of a sample and the extra one, from as many sequences as it takes."""
        row, extra, document = int(self._indices.shuffle[index]), self._extra, self._indices.document
        (first, start), (last, stop) = self._indices.sample[row].tolist(), self._indices.sample[row + 1].tolist()
        get = self._sequences.get
        if first == last:
            return [get(int(document[first]), start, stop + extra - start)]
        between = [get(sequence) for sequence in document[first + 1 : last].tolist()]
        return [get(int(document[first]), start), *between, get(int(document[last]), 0, stop + extra)]

    def _extras(self, tokens: np.ndarray, lengths: list[int]) -> dict[str, np.ndarray | np.generic]:
        options, extras = self._options, {}
        if options.reset_position_ids or options.reset_attention_mask:
            segment = np.zeros(len(tokens), np.int64)
            np.cumsum(tokens[:-1] == options.eod, out=segment[1:])
            if options.reset_position_ids:
                extras["position_ids"] = positions(np.bincount(segment))
            if options.reset_attention_mask:
                ahead = np.triu(np.ones((len(tokens), len(tokens)), bool), 1)
                extras["attention_mask"] = (ahead | (segment[:, None] != segment))[None]
        if options.inter_document_masking:
            parts = np.array([*lengths[:-1], lengths[-1] - self._extra])
            parts = parts[parts > 0]
            parts[-1] += self._seq_length - parts.sum()
            extras |= {"position_ids": positions(parts), **document_bounds(parts, self._seq_length)}
        return extras


def gpt_dataset(
    sequences: Sequences, request: Request, cache: IndexCache, options: Options | None = None
) -> GPTDataset:
    """The dataset of a request, its indexes from the cache."""

    def build() -> dict[str, np.ndarray]:
        built = build_indices(sequences.lengths, request)
        return {name: getattr(built, name) for name in NAMES}

    used = sequences.lengths[request.sequences.start : request.sequences.stop]
    arrays = cache.arrays(content_key("gpt", INDEX_VERSION, repr(request), used), NAMES, build)
    return GPTDataset(sequences, Indices(*arrays), request, options)
