"""`build_splits`: the datasets of a data section, single or blended (spec/data.md §4.2, §4.12)."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mt_core.errors import MtError, raise_if
from mt_core.types import Dataset
from mt_data.blend import BlendedDataset, exhaustive_blend, sized_blend
from mt_data.config import DataConfig
from mt_data.gpt.dataset import gpt_dataset
from mt_data.gpt.indices import Request
from mt_data.index_cache import IndexCache, content_key
from mt_data.indexed.reader import IndexedReader
from mt_data.paths import WeightedPaths, parse_paths
from mt_data.rules import data_problems
from mt_data.split import SPLITS, split_ranges

SURPLUS = 1 + 0.5 / 100
"""A weighted dataset is built this much larger than its share, as the blend may lean on it by a few samples."""

Wanted = int | None


@dataclass(frozen=True, slots=True)
class Splits:
    """The datasets; None where a split is not wanted or has no sequences."""

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None


def build_splits(
    config: DataConfig, *, samples: tuple[Wanted, Wanted, Wanted], seed: int, cache_dir: Path, builder: bool = True
) -> Splits:
    """The three datasets. Of each the samples wanted: 0 for no dataset, None for one epoch of what there is.

    A split that is wanted and empty is an `MtError`. Only the process with `builder` writes indexes; the others wait
    for its files. A dataset may be a little longer than asked for.
    """
    if not config.paths:
        raise MtError("data.paths", "names no data", "prefixes of .bin/.idx pairs; mt data preprocess writes them")
    raise_if(data_problems(config))
    corpus = Corpus(config, seed, IndexCache(cache_dir, builder))
    train, valid, test = (corpus.dataset(split, wanted) for split, wanted in enumerate(samples))
    return Splits(train, valid, test)


@dataclass(frozen=True)
class Corpus:
    """The files of a data section, opened once for all splits."""

    config: DataConfig
    seed: int
    cache: IndexCache

    @cached_property
    def paths(self) -> WeightedPaths:
        """Prefixes and weights."""
        return parse_paths(self.config.paths)

    @cached_property
    def readers(self) -> list[IndexedReader]:
        """One for each prefix."""
        return [IndexedReader(prefix) for prefix in self.paths.prefixes]

    @cached_property
    def masked(self) -> int | None:
        """The end-of-document id, if it takes no part in the loss."""
        if not self.config.eod_mask_loss or self.config.tokenizer is None:
            return None
        from mt_data.tokenizers import build

        return build(self.config.tokenizer).eod

    def dataset(self, split: int, wanted: Wanted) -> Dataset | None:
        """The dataset of a split by its number."""
        if wanted == 0 or (wanted is None and not any(self.sequences(r, split) for r in self.readers)):
            return None
        for reader in self.readers:
            if not self.sequences(reader, split):
                raise MtError(
                    f"the {SPLITS[split]} split of {reader.prefix}",
                    f"is empty: {len(reader)} sequences, split {self.config.split!r}",
                    f"a larger share for {SPLITS[split]}, more documents, or no {SPLITS[split]} samples",
                )
        if self.paths.weights:
            return self._weighted(split, wanted, self.paths.weights)
        return self._unweighted(split, wanted)

    def sequences(self, reader: IndexedReader, split: int) -> range:
        """Sequence numbers of a split in one file."""
        return split_ranges(self.config.split, len(reader))[split]

    def _part(self, number: int, split: int, wanted: Wanted) -> Dataset:
        reader = self.readers[number]
        request = Request(self.sequences(reader, split), wanted, self.config.seq_length, self.seed)
        return gpt_dataset(reader, request, self.cache, masked=self.masked)

    def _weighted(self, split: int, wanted: Wanted, weights: tuple[float, ...]) -> Dataset:
        """Each dataset is built for its share of the samples; the shares are rounded up, so the sum may exceed it."""
        if wanted is None:
            raise MtError("data.paths", f"weights need a number of {SPLITS[split]} samples", "give one, or no weights")
        shares = np.asarray(weights, np.float64) / np.sum(np.asarray(weights, np.float64))
        targets = [math.ceil(wanted * share) for share in shares]
        parts = [self._part(n, split, math.ceil(target * SURPLUS)) for n, target in enumerate(targets)]
        return self._blend(parts, weights, sum(targets))

    def _unweighted(self, split: int, wanted: Wanted) -> Dataset:
        """One file is itself; of several each gives one epoch, in proportion to its size."""
        if len(self.readers) == 1:
            return self._part(0, split, wanted)
        parts = [self._part(n, split, None) for n in range(len(self.readers))]
        lengths = [len(part) for part in parts]
        if wanted is None:
            return self._blend(parts, lengths, None)
        if wanted > sum(lengths):
            raise MtError(
                "data.paths",
                f"give one epoch without weights: {sum(lengths)} {SPLITS[split]} samples, {wanted} are wanted",
                "give weights, which repeat data, or ask for fewer samples",
            )
        return self._blend(parts, lengths, wanted)

    def _blend(self, parts: list[Dataset], weights: tuple[float, ...] | list[int], size: int | None) -> BlendedDataset:
        def build() -> dict[str, np.ndarray]:
            dataset, sample = exhaustive_blend([len(p) for p in parts]) if size is None else sized_blend(weights, size)
            return {"dataset": dataset, "dataset_sample": sample}

        key = content_key("blend", tuple(map(float, weights)), size)
        dataset, sample = self.cache.arrays(key, ("dataset", "dataset_sample"), build)
        used = np.bincount(dataset, minlength=len(parts)).tolist()
        for prefix, part, count in zip(self.paths.prefixes, parts, used, strict=True):
            if count > len(part):
                raise MtError(prefix, f"has {len(part)} samples, the blend takes {count}", "ask for more samples")
        return BlendedDataset(parts, dataset, sample)
