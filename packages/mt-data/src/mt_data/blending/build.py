"""Which part of which corpus each split is made of, and how the parts are blended.

Source: docs/specs/data.md §4.2, §4.12.

A `DatasetReader` opens a corpus, counts it and builds a dataset of a part of it; the rest is common to all kinds.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mt_core.contracts import Dataset
from mt_core.errors import MtError, raise_if
from mt_data.blending.blend import BlendedDataset, blend_by_weights, blend_exhaustively
from mt_data.blending.extension import Extension, NumSamples, PlannedSamples, extend_dataset, get_last
from mt_data.config.paths import WeightedPaths, resolve_split_paths
from mt_data.config.rules import data_problems
from mt_data.config.split import SPLITS, compute_split_ranges
from mt_data.indexed.cache import IndexCache, hash_content

if TYPE_CHECKING:
    from mt_data.config import Corpora

SURPLUS = 1 + 0.5 / 100
"""A weighted dataset is built this much larger than its share, as the blend may lean on it by a few samples."""

SplitSizes = tuple[PlannedSamples, PlannedSamples, PlannedSamples]
"""Numbers of training, validation and test samples."""


@dataclass(frozen=True, slots=True)
class Splits:
    """The dataset of each split; None where no samples are wanted or the split is empty."""

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None
    valid_sets: Mapping[str, Dataset] = field(default_factory=dict, kw_only=True)
    """By name, validation sets that are evaluated whole, apart and together, in place of `valid`; each of their samples
    has one number under `labels`."""


@dataclass(frozen=True, slots=True)
class SplitPart:
    """The part of a corpus that one dataset is made of."""

    split: int
    """0 for training, 1 for validation, 2 for test."""
    elements: range
    """Numbers of the corpus's elements that belong to the split."""
    samples: NumSamples
    extension: Extension = field(default_factory=Extension)


@dataclass(frozen=True, slots=True)
class DatasetReader:
    """How a kind of dataset reads one corpus."""

    open: Callable[[str], Any]
    """Opens the corpus at a prefix."""
    count: Callable[[Any], int]
    """Counts the elements of a corpus, which the split divides."""
    build: Callable[[Any, SplitPart], Dataset]
    """Builds the dataset of a part of a corpus."""
    elements: str
    """What the elements are called."""


def blend_splits(config: "Corpora", reader: DatasetReader, *, samples: SplitSizes, cache: IndexCache) -> Splits:
    """The three datasets of a section; a split that is wanted and empty is an `MtError`."""
    raise_if(data_problems(config))
    split_paths = resolve_split_paths(config)
    if not any(split_paths.splits):
        raise MtError("data.paths", "names no data", "prefixes of .bin/.idx pairs; mt data preprocess writes them")
    corpora: dict[str, Any] = {}
    datasets: list[Dataset | None] = []
    for split, num_samples in enumerate(samples):
        blend = _SplitBlend(config, reader, cache, corpora, split, split_paths.splits[split], shared=split_paths.shared)
        datasets.append(blend.build_dataset(num_samples))
    return Splits(*datasets)


@dataclass(frozen=True)
class _SplitBlend:
    """One split of the corpora; those that are open are shared between the splits."""

    config: "Corpora"
    reader: DatasetReader
    cache: IndexCache
    corpora: dict[str, Any]
    split: int
    paths: WeightedPaths | None
    shared: bool

    def build_dataset(self, planned: PlannedSamples) -> Dataset | None:
        """The dataset of the split, or None if no samples are wanted."""
        name, num_samples = SPLITS[self.split], get_last(planned)
        if num_samples == 0 or (num_samples is None and self.paths is None):
            return None
        if self.paths is None:
            raise MtError(f"data.{name}_paths", f"names no data, {num_samples} {name} samples are wanted", "prefixes")
        elements = [self._get_elements(prefix) for prefix in self.paths.prefixes]
        if num_samples is None and not any(elements):
            return None
        for prefix, numbers in zip(self.paths.prefixes, elements, strict=True):
            if not numbers:
                raise self._describe_empty(prefix)
        single = len(elements) == 1 and (not self.shared or not self.paths.weights)
        if single:
            return self._build_part(0, planned)
        return (
            self._blend_weighted(self.paths, planned)
            if self.paths.weights
            else self._blend_unweighted(self.paths, num_samples)
        )

    def _open_corpus(self, prefix: str) -> Any:
        if prefix not in self.corpora:
            self.corpora[prefix] = self.reader.open(prefix)
        return self.corpora[prefix]

    def _get_elements(self, prefix: str) -> range:
        count = self.reader.count(self._open_corpus(prefix))
        return compute_split_ranges(self.config.split, count)[self.split] if self.shared else range(count)

    def _describe_empty(self, prefix: str) -> MtError:
        name, count = SPLITS[self.split], self.reader.count(self._open_corpus(prefix))
        share = f", split {self.config.split!r}" if self.shared else ""
        actual = f"is empty: {count} {self.reader.elements}{share}"
        return MtError(
            f"the {name} split of {prefix}",
            actual,
            f"a larger share for {name}, more documents, or no {name} samples",
        )

    def _build_part(self, number: int, planned: PlannedSamples) -> Dataset:
        assert self.paths is not None
        prefix = self.paths.prefixes[number]
        corpus, elements = self._open_corpus(prefix), self._get_elements(prefix)

        def build(num_samples: NumSamples, extension: Extension) -> Dataset:
            return self.reader.build(corpus, SplitPart(self.split, elements, num_samples, extension))

        return extend_dataset(planned, build)

    def _blend_weighted(self, paths: WeightedPaths, planned: PlannedSamples) -> Dataset:
        """Blend by weights: each dataset has its share of the samples, rounded up, so there may be more of them."""
        if planned is None:
            raise MtError(
                paths.where, f"weights need a number of {SPLITS[self.split]} samples", "give it, or no weights"
            )
        weights = np.asarray(paths.weights, np.float64)
        shares = (weights / np.sum(weights)).tolist()
        plan = planned if isinstance(planned, tuple) else (planned,)
        targets = [[math.ceil(num_samples * share) for num_samples in plan] for share in shares]
        datasets = [
            self._build_part(n, tuple(math.ceil(target * SURPLUS) for target in grown))
            for n, grown in enumerate(targets)
        ]
        return self._blend(datasets, weights.tolist(), sum(grown[-1] for grown in targets))

    def _blend_unweighted(self, paths: WeightedPaths, num_samples: NumSamples) -> Dataset:
        """Blend corpora without weights: each gives one epoch, in proportion to its size."""
        datasets = [self._build_part(n, None) for n in range(len(paths.prefixes))]
        lengths = [len(dataset) for dataset in datasets]
        total = sum(lengths)
        if num_samples is not None and num_samples > total:
            raise MtError(
                paths.where,
                f"give one epoch without weights: {total} {SPLITS[self.split]} samples, {num_samples} are wanted",
                "give weights, which repeat data, or ask for fewer samples",
            )
        return self._blend(datasets, lengths, num_samples)

    def _blend(self, datasets: list[Dataset], weights: list[Any], size: int | None) -> BlendedDataset:
        def build() -> dict[str, np.ndarray]:
            dataset, sample = blend_exhaustively(weights) if size is None else blend_by_weights(weights, size)
            return {"dataset": dataset, "dataset_sample": sample}

        assert self.paths is not None
        key = hash_content("blend", tuple(map(float, weights)), size)
        dataset, sample = self.cache.get_arrays(key, ("dataset", "dataset_sample"), build)
        used = np.bincount(dataset, minlength=len(datasets)).tolist()
        for prefix, source, count in zip(self.paths.prefixes, datasets, used, strict=True):
            if count > len(source):
                raise MtError(prefix, f"has {len(source)} samples, the blend takes {count}", "ask for more samples")
        return BlendedDataset(datasets, dataset, sample)
