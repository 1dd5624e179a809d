"""`T5Dataset` (docs/specs/data.md §5.3)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from mt_core.contracts import Dataset
from mt_core.errors import MtError
from mt_data.blending.build import Splits, SplitSizes
from mt_data.blending.extension import NumSamples
from mt_data.config import T5Data
from mt_data.datasets.masking.build import (
    SentenceSamples,
    build_masked_splits,
    flatten,
    make_masking_config,
    pad_to_length,
)
from mt_data.datasets.masking.mask import MaskedTokens, MaskingConfig, WordPieceGroups, mask_tokens
from mt_data.datasets.masking.sentence_mapping import SentenceSampling
from mt_data.indexed.cache import IndexCache
from mt_data.tokenizers.base import MaskingTokenizer

SPECIAL = 2
"""How much shorter than the encoder's text the sentences of a sample are gathered."""


@dataclass(frozen=True, slots=True)
class T5TokenIds:
    """What a T5 sample needs of a tokenizer."""

    bos: int
    eos: int
    mask: int
    sentinels: tuple[int, ...]

    @classmethod
    def from_tokenizer(cls, tokenizer: MaskingTokenizer) -> "T5TokenIds":
        """The ids of a tokenizer that has the roles bos, eos and mask."""
        sentinels = tuple(tokenizer.additional_special_tokens_ids)
        return cls(tokenizer.bos, tokenizer.eos, tokenizer.mask, sentinels)

    def choose_replacement(self, token: int, random: np.random.RandomState) -> int:
        """Id that replaces a masked token."""
        del token, random
        return self.mask


@dataclass(frozen=True, slots=True)
class T5Dataset:
    """Sample i: the encoder reads the text with a sentinel for each masked run, the decoder writes the runs."""

    samples: SentenceSamples
    ids: T5TokenIds
    groups: WordPieceGroups
    masking: MaskingConfig
    encoder_length: int
    decoder_length: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray | np.generic]:
        """Int64: `text_enc`, `enc_mask` [L]; `text_dec`, `dec_mask`, `labels`, `loss_mask` [decoder's length].

        Masks are 1 where there is text; texts behind the end are 0, labels −1. `truncated` is 0 or 1.
        """
        ids = self.ids
        sentences, target = self.samples.read_sentences(index)
        whole = flatten(sentences)
        tokens = whole[:target]
        masked = mask_tokens(
            tokens,
            self.groups.group_words(tokens, full_words=self.masking.full_words),
            target,
            self.masking,
            random=self.samples.random_state(index),
            replace=ids.choose_replacement,
            lengths_random=self.samples.random_state(index),
        )
        encoder, runs = self._make_texts(masked)
        decoder, labels = [ids.bos, *runs], [*runs, ids.eos]
        self._check_lengths(len(encoder), len(decoder))
        return {
            "text_enc": pad_to_length(encoder, self.encoder_length, 0),
            "text_dec": pad_to_length(decoder, self.decoder_length, 0),
            "labels": pad_to_length(labels, self.decoder_length, -1),
            "loss_mask": pad_to_length([1] * len(decoder), self.decoder_length, 0),
            "truncated": np.int64(len(whole) > target),
            "enc_mask": pad_to_length([1] * len(encoder), self.encoder_length, 0),
            "dec_mask": pad_to_length([1] * len(decoder), self.decoder_length, 0),
        }

    def _make_texts(self, masked: MaskedTokens) -> tuple[list[int], list[int]]:
        """The tokens with a sentinel in place of each masked run, and the runs, each behind its sentinel."""
        if len(masked.spans) > len(self.ids.sentinels):
            raise MtError(
                "data.tokenizer",
                f"has {len(self.ids.sentinels)} sentinels, a sample has {len(masked.spans)} masked runs",
                "a larger data.tokenizer.vocab_extra_ids, T5 has 100",
            )
        encoder, runs, position = [], [], 0
        for sentinel, span in zip(self.ids.sentinels, masked.spans, strict=False):
            encoder += [*masked.tokens[position : span[0]], sentinel]
            runs += [sentinel, *(masked.labels[n] for n in span)]
            position = span[-1] + 1
        return [*encoder, *masked.tokens[position:]], runs

    def _check_lengths(self, encoder: int, decoder: int) -> None:
        for name, needed, length in (
            ("seq_length", encoder, self.encoder_length),
            ("decoder_seq_length", decoder, self.decoder_length),
        ):
            if needed > length:
                raise MtError(f"data.{name}", f"{length}, a sample has {needed} tokens", f"at least {needed}")


def build_splits(
    config: T5Data,
    *,
    samples: SplitSizes,
    seed: int,
    cache_dir: Path,
    builder: bool = True,
) -> Splits:
    """The three datasets of a section; shares of the split are of documents."""
    read_tokenizer = cache(lambda: _read_tokenizer(config))

    def build_dataset(sentence_samples: SentenceSamples) -> Dataset:
        return T5Dataset(
            sentence_samples,
            *read_tokenizer(),
            make_masking_config(config),
            config.seq_length,
            config.decoder_seq_length,
        )

    return build_masked_splits(
        config,
        build_dataset,
        partial(make_sentence_sampling, config, seed),
        samples=samples,
        cache=IndexCache(cache_dir, builder),
    )


def make_sentence_sampling(config: T5Data, seed: int, num_samples: NumSamples) -> SentenceSampling:
    """How sentences become `num_samples` samples."""
    return SentenceSampling(config.seq_length - SPECIAL, 1, config.short_seq_prob, seed, num_samples)


def _read_tokenizer(config: T5Data) -> tuple[T5TokenIds, WordPieceGroups]:
    from mt_data.tokenizers import build_tokenizer

    assert config.tokenizer is not None, "data_problems asks for one"
    tokenizer = build_tokenizer(config.tokenizer)
    return T5TokenIds.from_tokenizer(tokenizer), WordPieceGroups.from_tokenizer(tokenizer)  # pyright: ignore[reportArgumentType]
