"""`ICTDataset` (docs/specs/data.md §5.4).

The mapping has Megatron's order. Of each sample Megatron draws the sentence from one generator for the whole dataset,
so that samples depend on the order they are read in; here each has its own, of the seed and its number, and a resumed
run sees what an unbroken one does. Titles are those of the sample's own documents in every split; Megatron gives the
validation and test splits the titles of the first documents.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mt_core.contracts import Dataset
from mt_core.errors import MtError, raise_if
from mt_data.blending.build import Splits, SplitSizes
from mt_data.blending.extension import Extension, NumSamples, extend_dataset
from mt_data.config import ICTData
from mt_data.config.rules import data_problems
from mt_data.config.split import SPLITS, compute_legacy_ranges
from mt_data.datasets.masking.build import flatten, pad_to_length
from mt_data.datasets.masking.sentence_mapping import Sentences, SentenceSampling, build_block_mapping
from mt_data.indexed.cache import IndexCache, hash_content
from mt_data.indexed.reader import IndexedReader

SPECIAL = 3
"""Tokens of a context that are no words: CLS, SEP behind the title, SEP behind the block."""


@dataclass(frozen=True, slots=True)
class ICTTokenIds:
    """What an ICT sample needs of a tokenizer."""

    cls: int
    sep: int
    pad: int


@dataclass(frozen=True, slots=True)
class SentenceBlocks:
    """The blocks of a split and the titles of its documents."""

    reader: IndexedReader
    titles: IndexedReader | None
    mapping: np.ndarray
    """Rows of (first sentence, behind the last, document of the split, block)."""
    first_document: int

    def block(self, index: int) -> tuple[list[list[int]], list[int] | None]:
        """Token ids of a block's sentences, and those of its document's title."""
        first, behind, document, _ = self.mapping[index].tolist()
        title = self.titles.get(self.first_document + document).tolist() if self.titles else None
        return [self.reader.get(sentence).tolist() for sentence in range(first, behind)], title


@dataclass(frozen=True, slots=True)
class ICTDataset:
    """Sample i: a sentence of a block as the query, the title and the block as its context."""

    blocks: SentenceBlocks
    ids: ICTTokenIds
    seq_length: int
    query_in_block_prob: float
    seed: int

    def __len__(self) -> int:
        return len(self.blocks.mapping)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray | np.generic]:
        """Int64 `query_tokens`, `context_tokens` [L]; `…_mask` [L, L], 1 where both tokens are text;
        `…_pad_mask` [L], 1 where there is text; `block_data` [4], the row of the mapping."""
        sentences, title = self.blocks.block(index)
        draw = random.Random(self.seed + index)
        chosen = draw.randint(0, len(sentences) - 1)
        stays = draw.random() < self.query_in_block_prob
        query = sentences[chosen] if stays else sentences.pop(chosen)
        room = self.seq_length - (2 if title is None else SPECIAL + len(title))
        block = flatten(sentences)[: max(0, room)]
        ids = self.ids
        context = [ids.cls, *([] if title is None else [*title, ids.sep]), *block, ids.sep]
        return {
            **self._pad_tokens("query", [ids.cls, *query[: self.seq_length - 2], ids.sep]),
            **self._pad_tokens("context", context[: self.seq_length]),
            "block_data": self.blocks.mapping[index].astype(np.int64),
        }

    def _pad_tokens(self, name: str, tokens: list[int]) -> dict[str, np.ndarray]:
        text = pad_to_length(tokens, self.seq_length, self.ids.pad)
        pad_mask = pad_to_length([1] * len(tokens), self.seq_length, 0)
        return {f"{name}_tokens": text, f"{name}_mask": np.outer(pad_mask, pad_mask), f"{name}_pad_mask": pad_mask}


def build_splits(
    config: ICTData,
    *,
    samples: SplitSizes,
    seed: int,
    cache_dir: Path,
    builder: bool = True,
) -> Splits:
    """The three datasets of a section; shares of the split are of documents."""
    from mt_data.tokenizers import build_tokenizer

    raise_if(data_problems(config))
    assert config.tokenizer is not None, "data_problems asks for one"
    tokenizer, cache = build_tokenizer(config.tokenizer), IndexCache(cache_dir, builder)
    ids = ICTTokenIds(tokenizer.cls, tokenizer.sep, tokenizer.pad)  # pyright: ignore[reportAttributeAccessIssue]
    reader = IndexedReader(config.paths[0])
    titles = IndexedReader(config.titles) if config.titles else None
    if titles is not None and len(titles) != reader.document_count:
        actual = f"has {len(titles)} titles, {reader.prefix} has {reader.document_count} documents"
        raise MtError(titles.prefix, actual, "one title for each document, none of them empty")
    datasets: list[Dataset | None] = []
    for name, documents, planned in zip(
        SPLITS, compute_legacy_ranges(config.split, reader.document_count), samples, strict=True
    ):

        def build(
            num_samples: NumSamples, extension: Extension, name: str = name, documents: range = documents
        ) -> Dataset:
            part_seed = extension.derive_seed(seed)
            sampling = make_sentence_sampling(config, part_seed, num_samples)
            blocks = _build_blocks(reader, titles, documents, sampling, cache)
            if num_samples and not len(blocks.mapping):
                actual = f"is empty: {len(documents)} documents, split {config.split!r}, give no block"
                raise MtError(f"the {name} split of {reader.prefix}", actual, f"more documents, or no {name} samples")
            return ICTDataset(blocks, ids, config.seq_length, config.query_in_block_prob, part_seed)

        empty = planned == 0 or (planned is None and not documents)
        datasets.append(None if empty else extend_dataset(planned, build))
    return Splits(*datasets)


def make_sentence_sampling(config: ICTData, seed: int, num_samples: NumSamples) -> SentenceSampling:
    """How sentences become `num_samples` blocks."""
    return SentenceSampling(
        config.seq_length - SPECIAL, 1 if config.one_sentence_documents else 2, 0.0, seed, num_samples
    )


def get_title_lengths(titles: IndexedReader | None, documents: range) -> np.ndarray:
    """Tokens of the documents' titles."""
    return np.asarray(titles.lengths)[documents.start : documents.stop] if titles else np.zeros(len(documents), int)


def _build_blocks(
    reader: IndexedReader, titles: IndexedReader | None, documents: range, sampling: SentenceSampling, cache: IndexCache
) -> SentenceBlocks:
    bounds = np.asarray(reader.documents[documents.start : documents.stop + 1])
    lengths = get_title_lengths(titles, documents)
    key = hash_content("blocks", repr(sampling), reader.lengths, bounds, lengths)
    sentences = Sentences(np.asarray(reader.lengths), bounds)
    (mapping,) = cache.get_arrays(
        key, ("mapping",), lambda: {"mapping": build_block_mapping(sentences, lengths, sampling)}
    )
    return SentenceBlocks(reader, titles, mapping, documents.start)
