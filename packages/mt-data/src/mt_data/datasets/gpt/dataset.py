"""`GPTDataset`: samples of L tokens and their labels, in training order, and `build_splits` for a section of data.

The samples are specified in docs/specs/data.md §4.7 and §4.9, splits and blends in docs/specs/data.md §4.2 and §4.12.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mt_core.contracts import Dataset
from mt_data.blending.build import DatasetReader, SplitPart, Splits, SplitSizes, blend_splits
from mt_data.config import GPTData, TokenStream
from mt_data.datasets.gpt.indices import IndexRequest, SampleIndices, build_indices
from mt_data.datasets.packing import make_position_ids, make_segment_ids
from mt_data.indexed.cache import IndexCache, hash_content
from mt_data.indexed.reader import IndexedReader

INDEX_NAMES = ("document", "sample", "shuffle")
INDEX_VERSION = 2
"""Goes into the cache's keys; to be raised when the indexes of a request change."""


class TokenSequences(Protocol):
    """Where tokens come from: an `IndexedReader`, or the mock corpus."""

    lengths: np.ndarray
    """Tokens of each sequence, int32 [S]."""

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of a sequence, or to its end."""
        ...


@dataclass(frozen=True, slots=True)
class GPTSampleOptions:
    """What a sample says about the documents in it; those that are off add nothing to it."""

    eod: int = -1
    """Id that ends a document."""
    eod_mask_loss: bool = False
    """An input token that ends a document takes no part in the loss."""
    reset_position_ids: bool = False
    """Add `position_ids`."""
    reset_attention_mask: bool = False
    """Add `make_segment_ids`, which change behind every end of document."""
    inter_document_masking: bool = False
    """Add `make_segment_ids`, a number for each document, and `position_ids`."""


class GPTDataset:
    """Sample i of a split, cut from the stream that `SampleIndices` describes."""

    def __init__(
        self,
        sequences: TokenSequences,
        indices: SampleIndices,
        request: IndexRequest,
        options: GPTSampleOptions | None = None,
    ) -> None:
        self._sequences, self._indices = sequences, indices
        self._seq_length, self._extra = request.seq_length, request.extra
        self._options = options or GPTSampleOptions()

    def __len__(self) -> int:
        return len(self._indices.shuffle)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray | np.generic]:
        """`tokens`, `labels` int64 [L] and `loss_mask` float32 [L], and what the options add.

        The mask is 0 where the label is padding, as behind the end of a partial last sample, and where an option says;
        padding is 0, and no token of a document is padding, whatever its id.
        """
        pieces = self.read_pieces(index)
        text = np.zeros(self._seq_length + self._extra, np.int64)
        stream = np.concatenate(pieces)
        text[: len(stream)] = stream
        return self.make_sample(text, [len(piece) for piece in pieces], text_length=len(stream))

    def make_sample(
        self, text: np.ndarray, lengths: list[int], *, text_length: int
    ) -> Mapping[str, np.ndarray | np.generic]:
        """The sample that L tokens and the extra one make, of documents of the given lengths.

        What follows the first `text_length` tokens is padding.
        """
        tokens, labels = (text[:-1], text[1:]) if self._extra else (text, np.append(text[1:], 0))
        ends = tokens == self._options.eod
        ends[text_length:] = False
        loss_mask = np.ones(self._seq_length, np.float32)
        if self._options.eod_mask_loss:
            loss_mask[ends] = 0.0
        loss_mask[max(0, text_length - 1) :] = 0.0  # the label of a token is the one behind it
        return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, **self._make_extras(ends, lengths)}

    def read_pieces(self, index: int) -> list[np.ndarray]:
        """The tokens of a sample and the extra one, from as many sequences as it takes."""
        row, extra, document = int(self._indices.shuffle[index]), self._extra, self._indices.document
        (first, start), (last, stop) = self._indices.sample[row].tolist(), self._indices.sample[row + 1].tolist()
        get = self._sequences.get
        if first == last:
            return [get(int(document[first]), start, stop + extra - start)]
        between = [get(sequence) for sequence in document[first + 1 : last].tolist()]
        return [get(int(document[first]), start), *between, get(int(document[last]), 0, stop + extra)]

    def _make_extras(self, ends: np.ndarray, lengths: list[int]) -> dict[str, np.ndarray | np.generic]:
        options, extras = self._options, {}
        if options.reset_position_ids or options.reset_attention_mask:
            segment = np.zeros(len(ends), np.int64)
            np.cumsum(ends[:-1], out=segment[1:])
            if options.reset_position_ids:
                extras["position_ids"] = make_position_ids(np.bincount(segment))
            if options.reset_attention_mask:
                extras["segment_ids"] = segment
        if options.inter_document_masking:
            parts = np.array([*lengths[:-1], lengths[-1] - self._extra])
            parts = parts[parts > 0]
            parts[-1] += self._seq_length - parts.sum()
            extras |= {
                "position_ids": make_position_ids(parts),
                "segment_ids": make_segment_ids(parts, self._seq_length),
            }
        return extras


def build_gpt_dataset(
    sequences: TokenSequences, request: IndexRequest, cache: IndexCache, options: GPTSampleOptions | None = None
) -> GPTDataset:
    """The dataset of a request, its indexes from the cache."""

    def build_arrays() -> dict[str, np.ndarray]:
        built = build_indices(sequences.lengths, request)
        return {name: getattr(built, name) for name in INDEX_NAMES}

    used = sequences.lengths[request.sequences.start : request.sequences.stop]
    arrays = cache.get_arrays(hash_content("gpt", INDEX_VERSION, repr(request), used), INDEX_NAMES, build_arrays)
    return GPTDataset(sequences, SampleIndices(*arrays), request, options)


def build_splits(
    config: GPTData,
    *,
    samples: SplitSizes,
    seed: int,
    cache_dir: Path,
    builder: bool = True,
) -> Splits:
    """The three datasets; `samples` are 0 for no dataset, None for one epoch of what there is.

    A split that is wanted and empty is an `MtError`. Only the process with `builder` writes indexes; the others wait
    for its files. A dataset may be a little longer than asked for.
    """
    cache = IndexCache(cache_dir, builder)
    sample_options = functools.cache(lambda: make_sample_options(config))

    def build_dataset(reader: IndexedReader, part: SplitPart) -> Dataset:
        return build_gpt_dataset(reader, make_index_request(config, part, seed), cache, sample_options())

    return blend_splits(
        config, DatasetReader(IndexedReader, len, build_dataset, "sequences"), samples=samples, cache=cache
    )


def make_index_request(config: GPTData, part: SplitPart, seed: int) -> IndexRequest:
    """The indexes that a part of a corpus needs."""
    return IndexRequest(
        part.elements,
        part.samples,
        config.seq_length,
        part.extension.derive_seed(seed),
        keep_partial=config.keep_partial_valid and part.split == 1,
        extra=int(config.extra_token),
    )


def make_sample_options(config: TokenStream) -> GPTSampleOptions:
    """What the samples of a section say about documents, with the tokenizer's ids."""
    names = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask", "inter_document_masking")
    flags = {name: getattr(config, name, False) for name in names}
    eod = -1
    if config.tokenizer is not None and any(flags.values()):
        from mt_data.tokenizers import build_tokenizer

        eod = build_tokenizer(config.tokenizer).eod
    return GPTSampleOptions(eod, **flags)
