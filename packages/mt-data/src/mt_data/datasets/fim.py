"""`FIMDataset`: GPT samples whose documents are cut at two random characters (docs/specs/data.md §5.8).

Megatron draws from one generator for the whole dataset, so that samples depend on the order they are read in. Here
each has its own, of the seed and its number, and a resumed run sees what an unbroken one does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mt_core.contracts import Dataset, Tokenizer
from mt_core.errors import MtError, raise_if
from mt_data.blending.build import DatasetReader, SplitPart, Splits, SplitSizes, blend_splits
from mt_data.config import FIMData
from mt_data.config.rules import data_problems
from mt_data.datasets.gpt.dataset import GPTDataset, build_gpt_dataset, make_sample_options
from mt_data.datasets.gpt.indices import IndexRequest
from mt_data.indexed.cache import IndexCache
from mt_data.indexed.reader import IndexedReader

TOKENS = ("prefix_token", "middle_token", "suffix_token", "pad_token", "eod_token")


@dataclass(frozen=True, slots=True)
class FIMTransform:
    """How documents are rearranged."""

    tokenizer: Tokenizer
    prefix: int
    middle: int
    suffix: int
    pad: int
    eod: int
    split: int | None
    config: FIMData

    def transform_sample(self, text: np.ndarray, random: np.random.RandomState) -> tuple[np.ndarray, int]:
        """A text of several documents with some of them rearranged, cut or filled up to its length.

        The number is that of the tokens before the filling.
        """
        ends = [*np.flatnonzero(text == self.eod).tolist(), len(text)]
        result: list[int] = []
        for start, end in zip([-1, *ends[:-1]], ends, strict=True):
            if end > start + 1:
                result += self.transform_document(text[start + 1 : end].tolist(), random)
                result += [self.eod] if end < len(text) else []
        filled = np.full(len(text), self.pad, np.int64)
        filled[: len(result)] = result[: len(text)]
        return filled, min(len(result), len(text))

    def transform_document(self, tokens: list[int], random: np.random.RandomState) -> list[int]:
        """A document, perhaps rearranged, with a split token fragment by fragment."""
        if self.split is None or self.split not in tokens:
            return self.rearrange(tokens, self.config.rate, random)
        if not random.binomial(1, self.config.rate):
            return tokens
        result: list[int] = []
        while self.split in tokens:
            end = tokens.index(self.split)
            fragment, tokens = tokens[:end], tokens[end + 1 :]
            result += [*self._rearrange_fragment(fragment, random), self.split]
        return [*result, *self._rearrange_fragment(tokens, random)]

    def _rearrange_fragment(self, tokens: list[int], random: np.random.RandomState) -> list[int]:
        return self.rearrange(tokens, self.config.fragment_rate, random) if tokens else []

    def rearrange(self, tokens: list[int], rate: float, random: np.random.RandomState) -> list[int]:
        """With probability `rate` the prefix, suffix and middle of the text, else the tokens."""
        if not random.binomial(1, rate):
            return tokens
        text = self.tokenizer.decode(tokens)
        if self.config.no_prefix is not None and text.startswith(self.config.no_prefix):
            return tokens
        low, high = sorted(random.randint(0, len(text) + 1, size=2).tolist())
        prefix, middle, suffix = map(self.tokenizer.encode, (text[:low], text[low:high], text[high:]))
        if random.binomial(1, self.config.spm_rate):
            return [self.prefix, self.suffix, *suffix, self.middle, *prefix, *middle]
        return [self.prefix, *prefix, self.suffix, *suffix, self.middle, *middle]


@dataclass(frozen=True, slots=True)
class FIMDataset:
    """The samples of a `GPTDataset`, rearranged."""

    samples: GPTDataset
    transform: FIMTransform
    seed: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray | np.generic]:
        """What a `GPTDataset` gives."""
        text = np.concatenate(self.samples.read_pieces(index)).astype(np.int64)
        random = np.random.RandomState((self.seed + index) % 2**32)
        changed, text_length = self.transform.transform_sample(text, random)
        return self.samples.make_sample(changed, [len(text)], text_length=text_length)


def build_splits(
    config: FIMData,
    *,
    samples: SplitSizes,
    seed: int,
    cache_dir: Path,
    builder: bool = True,
) -> Splits:
    """The three datasets of a section."""
    raise_if(data_problems(config))
    cache, sample_options, transform = (
        IndexCache(cache_dir, builder),
        make_sample_options(config),
        _make_transform(config),
    )

    def build_dataset(reader: IndexedReader, part: SplitPart) -> Dataset:
        part_seed = part.extension.derive_seed(seed)
        request = IndexRequest(part.elements, part.samples, config.seq_length, part_seed)
        return FIMDataset(build_gpt_dataset(reader, request, cache, sample_options), transform, part_seed)

    return blend_splits(
        config, DatasetReader(IndexedReader, len, build_dataset, "sequences"), samples=samples, cache=cache
    )


def _make_transform(config: FIMData) -> FIMTransform:
    from mt_data.tokenizers import build_tokenizer

    assert config.tokenizer is not None, "data_problems asks for one"
    tokenizer = build_tokenizer(config.tokenizer)
    known = tokenizer.vocabulary()  # pyright: ignore[reportAttributeAccessIssue]
    names = (*TOKENS, *(["split_token"] if config.split_token is not None else []))
    if missing := [name for name in names if getattr(config, name) not in known]:
        actual = f"{getattr(config, missing[0])!r} is not in the tokenizer's vocabulary"
        raise MtError(f"data.{missing[0]}", actual, "the text of one of its tokens")
    ids = [known[getattr(config, name)] for name in TOKENS]
    return FIMTransform(tokenizer, *ids, split=known.get(config.split_token), config=config)
