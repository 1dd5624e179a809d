"""`BERTDataset` (docs/specs/data.md §5.2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from mt_core.contracts import Dataset
from mt_data.blending.build import Splits, SplitSizes
from mt_data.blending.extension import NumSamples
from mt_data.config import BERTData
from mt_data.datasets.masking.build import (
    SentenceSamples,
    build_masked_splits,
    flatten,
    make_masking_config,
    pad_to_length,
)
from mt_data.datasets.masking.mask import MaskingConfig, WordPieceGroups, mask_tokens
from mt_data.datasets.masking.sentence_mapping import SentenceSampling
from mt_data.indexed.cache import IndexCache
from mt_data.tokenizers.base import MaskingTokenizer

SPECIAL = 3
"""Tokens of a sample that are no words: one before the first part, one behind each."""
MASKED, RANDOM = 0.8, 0.5
"""A masked token becomes the mask id with the first probability, else a random id with the second, else it stays."""


@dataclass(frozen=True, slots=True)
class BERTTokenIds:
    """What a BERT sample needs of a tokenizer."""

    cls: int
    sep: int
    mask: int
    vocabulary: np.ndarray
    """All ids, ascending."""

    @classmethod
    def from_tokenizer(cls, tokenizer: MaskingTokenizer) -> "BERTTokenIds":
        """The ids of a tokenizer that has the roles cls, sep and mask."""
        vocabulary = np.array(sorted(tokenizer.vocabulary().values()), np.int64)
        return cls(tokenizer.cls, tokenizer.sep, tokenizer.mask, vocabulary)

    def choose_replacement(self, token: int, random: np.random.RandomState) -> int:
        """Id that replaces a masked token."""
        if random.random_sample() < MASKED:
            return self.mask
        if random.random_sample() >= RANDOM:
            return int(self.vocabulary[random.randint(0, len(self.vocabulary))])
        return token


@dataclass(frozen=True, slots=True)
class BERTDataset:
    """Sample i: CLS, the first part, SEP and, with two parts, the second and SEP; words of both are masked."""

    samples: SentenceSamples
    ids: BERTTokenIds
    groups: WordPieceGroups
    masking: MaskingConfig
    seq_length: int
    two_parts: bool

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray | np.generic]:
        """Int64 [L]: `text`, `types` (1 in the second part), `labels` (−1 where nothing is masked), `padding_mask`
        (1 where there is text) and `loss_mask` (1 where a token is masked); `is_random` and `truncated` 0 or 1.

        Padding is 0 in all but the labels.
        """
        ids, random = self.ids, self.samples.random_state(index)
        sentences, target = self.samples.read_sentences(index)
        first, second, exchanged = self._split_parts(sentences, random)
        truncated = _truncate(first, second, target, random)
        tokens = [ids.cls, *first, ids.sep, *(second and [*second, ids.sep])]
        types = [0] * (len(first) + 2) + [1] * (len(tokens) - len(first) - 2)
        masked = mask_tokens(
            tokens,
            self.groups.group_words(tokens, full_words=self.masking.full_words),
            target,
            self.masking,
            random=random,
            replace=ids.choose_replacement,
            lengths_random=self.samples.random_state(index),
        )
        labels = np.full(self.seq_length, -1, np.int64)
        labels[list(masked.labels)] = list(masked.labels.values())
        return {
            "text": pad_to_length(masked.tokens, self.seq_length, 0),
            "types": pad_to_length(types, self.seq_length, 0),
            "labels": labels,
            "is_random": np.int64(exchanged),
            "padding_mask": pad_to_length([1] * len(tokens), self.seq_length, 0),
            "loss_mask": pad_to_length([int(n in masked.labels) for n in range(len(tokens))], self.seq_length, 0),
            "truncated": np.int64(truncated),
        }

    def _split_parts(
        self, sentences: list[list[int]], random: np.random.RandomState
    ) -> tuple[list[int], list[int], bool]:
        """The two parts and whether the second stands first."""
        pivot = len(sentences)
        if self.two_parts:
            pivot = random.randint(1, len(sentences)) if len(sentences) >= 3 else 1
        first, second = flatten(sentences[:pivot]), flatten(sentences[pivot:])
        if self.two_parts and random.random_sample() < 0.5:
            return second, first, True
        return first, second, False


def _truncate(first: list[int], second: list[int], target: int, random: np.random.RandomState) -> bool:
    """Take tokens off either end of the longer part until both have `target`; whether there were any to take."""
    excess = len(first) + len(second) - target
    for _ in range(excess):
        longer = first if len(first) > len(second) else second
        del longer[0 if random.random_sample() < 0.5 else -1]
    return excess > 0


def build_splits(
    config: BERTData,
    *,
    samples: SplitSizes,
    seed: int,
    cache_dir: Path,
    builder: bool = True,
) -> Splits:
    """The three datasets of a section; shares of the split are of documents."""
    read_tokenizer = cache(lambda: _read_tokenizer(config))

    def build_dataset(sentence_samples: SentenceSamples) -> Dataset:
        return BERTDataset(
            sentence_samples,
            *read_tokenizer(),
            make_masking_config(config),
            config.seq_length,
            config.classification_head,
        )

    return build_masked_splits(
        config,
        build_dataset,
        partial(make_sentence_sampling, config, seed),
        samples=samples,
        cache=IndexCache(cache_dir, builder),
    )


def make_sentence_sampling(config: BERTData, seed: int, num_samples: NumSamples) -> SentenceSampling:
    """How sentences become `num_samples` samples."""
    sentences = 2 if config.classification_head else 1
    return SentenceSampling(config.seq_length - SPECIAL, sentences, config.short_seq_prob, seed, num_samples)


def _read_tokenizer(config: BERTData) -> tuple[BERTTokenIds, WordPieceGroups]:
    from mt_data.tokenizers import build_tokenizer

    assert config.tokenizer is not None, "data_problems asks for one"
    tokenizer = build_tokenizer(config.tokenizer)
    return BERTTokenIds.from_tokenizer(tokenizer), WordPieceGroups.from_tokenizer(tokenizer)  # pyright: ignore[reportArgumentType]
