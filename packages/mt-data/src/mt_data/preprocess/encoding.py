"""Pieces to token ids: what a worker process does, and all that it sends back."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain

import numpy as np

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError, Problem
from mt_data.config import TokenizerConfig
from mt_data.indexed.format import choose_token_dtype
from mt_data.preprocess.chunking import CuttingOptions, InputPiece, InputPosition
from mt_data.preprocess.reading import read_documents
from mt_data.preprocess.sentences import SentenceSplitting, split_sentences
from mt_data.text_io.json_documents import TextValue
from mt_data.tokenizers import build_tokenizer
from mt_data.tokenizers.fast_bpe import EncodeBatch, choose_encode


@dataclass(frozen=True, slots=True)
class EncodingOptions:
    """How documents become tokens."""

    tokenizer: TokenizerConfig
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    """End every document that has a token with the end-of-document id; an empty one stays empty.

    Source: docs/specs/data.md §2.4.
    """
    splitting: SentenceSplitting | None = None
    """How texts are cut into sentences, each a sequence; None leaves a text whole."""


@dataclass(frozen=True, slots=True)
class EncodedKey:
    """One key of the documents of a piece."""

    tokens: np.ndarray
    """Ids of all sequences, one after the other."""
    lengths: np.ndarray
    """Tokens of each sequence, none of them 0; int32."""
    sequences: np.ndarray
    """Sequences of each document, 0 for an empty one; int32."""


@dataclass(frozen=True, slots=True)
class EncodedPiece:
    """The documents of a piece."""

    keys: dict[str, EncodedKey]
    problems: list[Problem] = field(default_factory=list)
    """One for each line that is not a document."""
    bytes: int = 0
    """Size of the text, decompressed."""
    disk_bytes: int = 0
    """Size of the piece on the disk."""
    after: InputPosition = field(default_factory=InputPosition)
    """Where the next piece begins."""


@cache
def get_tokenizer(encoding: EncodingOptions) -> Tokenizer:
    """The tokenizer, built once a process."""
    return build_tokenizer(encoding.tokenizer)


@cache
def _get_encode(encoding: EncodingOptions) -> EncodeBatch:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # read by the library; the workers are the parallelism
    return choose_encode(get_tokenizer(encoding), encoding.tokenizer)


def encode_piece(encoding: EncodingOptions, cut: CuttingOptions, piece: InputPiece) -> EncodedPiece:
    """Read, parse, split and tokenize a piece."""
    documents = read_documents(piece.source, cut)
    keys = {
        key: encode_values([values[column] for values in documents.values], encoding)
        for column, key in enumerate(encoding.keys)
    }
    return EncodedPiece(keys, documents.problems, documents.bytes, piece.disk_bytes, piece.after)


def encode_values(values: Sequence[TextValue], encoding: EncodingOptions) -> EncodedKey:
    """The sequences of documents: one for each sentence that has a token, or one for a text that is left whole."""
    documents = [_split_value(value, encoding.splitting) for value in values]
    batch = _get_encode(encoding)([sentence for document in documents for sentence in document])
    counts = np.fromiter(map(len, documents), np.int64, count=len(documents))
    lengths = np.fromiter(map(len, batch), np.int32, count=len(batch))
    bounds = np.concatenate([[0], np.cumsum(counts)])
    before = np.concatenate([[0], np.cumsum(lengths > 0)])  # sequences before each sentence
    sequences = before[bounds[1:]] - before[bounds[:-1]]
    last = _find_last_sentences(lengths, sequences) if encoding.append_eod else np.zeros(0, np.int64)
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = _concatenate(batch, int(ends[-1]) if len(ends) else 0, ends[last], get_tokenizer(encoding))
    lengths[last] += 1
    return EncodedKey(tokens, lengths[lengths > 0], sequences.astype(np.int32))


def _split_value(value: TextValue, splitting: SentenceSplitting | None) -> list[str]:
    if isinstance(value, list):
        return value
    return split_sentences(value, splitting) if splitting else [value]


def _find_last_sentences(lengths: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """Number of the last sentence with a token of every document that has one."""
    kept = np.flatnonzero(lengths)
    return kept[np.cumsum(sequences)[sequences > 0] - 1]


def _concatenate(batch: Sequence[Sequence[int]], tokens: int, ends: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """All `tokens` ids of a batch in one array, with the end of document at `ends`."""
    ids = np.fromiter(chain.from_iterable(batch), np.int64, count=tokens)
    small = choose_token_dtype(tokenizer.vocab_size)
    if tokens and not (ids.min() >= 0 and ids.max() <= np.iinfo(small).max):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise MtError(
            "tokenizer",
            f"token id {wrong} does not fit into {small.name}, which {tokenizer.vocab_size:,} ids are stored in",
            f"ids 0 to {np.iinfo(small).max}; the tokenizer's vocab_size is too small for its ids",
        )
    ids = ids.astype(small)
    return np.insert(ids, ends, tokenizer.eod) if len(ends) else ids
