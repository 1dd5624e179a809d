"""Chunks of lines to token ids: what a worker process does, and all that it sends back."""

from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np

from mt_core.errors import Problem
from mt_core.types import Tokenizer
from mt_data.config import TokenizerConfig
from mt_data.indexed.format import token_dtype
from mt_data.preprocess.documents import parse_chunk
from mt_data.preprocess.lines import Chunk
from mt_data.tokenizers import build


@dataclass(frozen=True, slots=True)
class Encoding:
    """How documents become tokens."""

    tokenizer: TokenizerConfig
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    """End every document that has a token with the end-of-document id; an empty one stays empty (spec/data.md §2.4)."""


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """The documents of a chunk."""

    tokens: dict[str, np.ndarray]
    """For each key the ids of all documents, one after the other."""
    lengths: dict[str, np.ndarray]
    """For each key the tokens of each document, int32."""
    problems: list[Problem]
    """One for each line that is not a document."""
    bytes: int
    """Size of the lines."""


@cache
def tokenizer_of(encoding: Encoding) -> Tokenizer:
    """The tokenizer, built once a process."""
    return build(encoding.tokenizer)


def encode_chunk(encoding: Encoding, chunk: Chunk) -> EncodedChunk:
    """Parse and tokenize the lines of a chunk."""
    documents, problems = parse_chunk(chunk, encoding.keys)
    tokens, lengths = {}, {}
    for at, key in enumerate(encoding.keys):
        tokens[key], lengths[key] = _encode([texts[at] for texts in documents], encoding)
    return EncodedChunk(tokens, lengths, problems, sum(map(len, chunk.lines)) + len(chunk.lines))


def _encode(texts: list[str], encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = tokenizer_of(encoding)
    batch = tokenizer.encode_batch(texts)
    if encoding.append_eod:
        for ids in batch:
            if ids:
                ids.append(tokenizer.eod)
    lengths = np.fromiter(map(len, batch), np.int32, count=len(batch))
    tokens = np.fromiter(chain.from_iterable(batch), np.int64, count=int(lengths.sum(dtype=np.int64)))
    small = token_dtype(tokenizer.vocab_size)
    fits = not len(tokens) or int(tokens.max()) <= np.iinfo(small).max  # else the writer says what is wrong
    return tokens.astype(small) if fits else tokens, lengths
