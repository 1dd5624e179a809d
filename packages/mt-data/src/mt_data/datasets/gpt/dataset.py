"""`GPTDataset`: samples of L tokens and their labels, in training order, and `build_splits` for a section of data.

The samples are specified in docs/specs/data.md §4.7 and §4.9, splits and blends in docs/specs/data.md §4.2 and §4.12.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mt_core.contracts import Dataset
from mt_data.blending.build import Parts, Portion, Splits, Wanted, mix
from mt_data.config import GPTData, Stream
from mt_data.datasets.gpt.indices import Indices, Request, build_indices
from mt_data.datasets.packing import positions, segment_ids
from mt_data.indexed.cache import IndexCache, content_key
from mt_data.indexed.reader import IndexedReader
from mt_data.tokenizers.base import pad_id

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
    """Add `segment_ids`, which change behind every end of document."""
    inter_document_masking: bool = False
    """Add `segment_ids`, a number for each document, and `position_ids`."""


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
                extras["segment_ids"] = segment
        if options.inter_document_masking:
            parts = np.array([*lengths[:-1], lengths[-1] - self._extra])
            parts = parts[parts > 0]
            parts[-1] += self._seq_length - parts.sum()
            extras |= {"position_ids": positions(parts), "segment_ids": segment_ids(parts, self._seq_length)}
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


def build_splits(
    config: GPTData, *, samples: tuple[Wanted, Wanted, Wanted], seed: int, cache_dir: Path, builder: bool = True
) -> Splits:
    """The three datasets. Of each the samples wanted: 0 for no dataset, None for one epoch of what there is.

    A split that is wanted and empty is an `MtError`. Only the process with `builder` writes indexes; the others wait
    for its files. A dataset may be a little longer than asked for.
    """
    cache = IndexCache(cache_dir, builder)
    found: list[Options] = []

    def build(reader: IndexedReader, portion: Portion) -> Dataset:
        if not found:
            found.append(options(config))
        return gpt_dataset(reader, request(config, portion, seed), cache, found[0])

    return mix(config, Parts(IndexedReader, len, build, "sequences"), samples=samples, cache=cache)


def request(config: GPTData, portion: Portion, seed: int) -> Request:
    """The indexes that a portion of a corpus needs."""
    return Request(
        portion.elements,
        portion.samples,
        config.seq_length,
        seed,
        keep_partial=config.keep_partial_valid and portion.split == 1,
        extra=int(config.extra_token),
    )


def options(config: Stream) -> Options:
    """What the samples of a section say about documents, with the tokenizer's ids."""
    eod = pad = -1
    if config.tokenizer is not None:
        from mt_data.tokenizers import build

        tokenizer = build(config.tokenizer)
        eod, pad = tokenizer.eod, pad_id(tokenizer)
    names = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask", "inter_document_masking")
    return Options(eod, pad, **{name: getattr(config, name, False) for name in names})
