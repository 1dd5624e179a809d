"""What a run draws from its sources: samples, tokens and epochs of each (docs/specs/data.md §4.1 to §4.4, §4.12)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mt_core.errors import MtError
from mt_data.blending.blend import blend_by_weights
from mt_data.config.paths import WeightedPaths
from mt_data.config.split import SPLITS, compute_split_ranges
from mt_data.indexed.reader import IndexedReader


@dataclass(frozen=True, slots=True)
class StreamSampling:
    """How samples are cut from a stream of tokens."""

    seq_length: int
    extra: int = 1
    """Tokens that a sample reads behind its own, for the last label."""


@dataclass(frozen=True, slots=True)
class Source:
    """A corpus, or the part of it that belongs to a split."""

    prefix: str
    tokens: int | None
    """Number of tokens; None where only tokenizing would show it."""
    weight: float | None = None
    units: int | None = None
    """Samples of one epoch, where they are not cut from a stream of tokens."""

    def count_per_epoch(self, cut: StreamSampling) -> int:
        """Number of samples of one epoch."""
        if self.units is not None:
            return self.units
        return max(0, (self.tokens or 0) - cut.extra) // cut.seq_length

    def count_epochs(self, samples: int, cut: StreamSampling) -> float:
        """How often `samples` samples read the source."""
        return samples / self.units if self.units is not None else samples * cut.seq_length / (self.tokens or 1)


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """What is taken from a source."""

    source: Source
    share: float
    """Part of all samples, 0 to 1."""
    samples: int
    epochs: float
    """How often the source is read."""


def make_sources(paths: WeightedPaths, tokens: Sequence[int]) -> list[Source]:
    """The sources of a list of paths, of so many tokens each."""
    weights = paths.weights or [None] * len(paths.prefixes)
    return [Source(*row) for row in zip(paths.prefixes, tokens, weights, strict=True)]


def count_split_tokens(reader: IndexedReader, split: str, number: int) -> int:
    """Tokens of the training (0), validation (1) or test (2) part of a corpus; an empty part is an `MtError`."""
    part = select_split(
        reader.prefix, compute_split_ranges(split, len(reader)), number, f"{len(reader)} sequences, split {split!r}"
    )
    return int(reader.lengths[part.start : part.stop].sum(dtype=np.int64))


def select_split(prefix: str, parts: Sequence[range], number: int, what: str) -> range:
    """One part of a corpus; an empty one is an `MtError`."""
    if not parts[number]:
        name = SPLITS[number]
        raise MtError(f"the {name} split of {prefix}", f"is empty: {what}", f"a larger share for {name}")
    return parts[number]


def plan_sources(sources: Sequence[Source], samples: int, cut: StreamSampling) -> list[SourcePlan]:
    """What a run of `samples` takes from each source, counted in the very order of the blend.

    With weights, or from a single source, corpora are repeated as needed. Several without weights give at most one
    epoch together; to want more is an `MtError`, as it is when the run begins.
    """
    if empty := [source for source in sources if 0 in (source.tokens, source.units)]:
        what = "tokens" if empty[0].tokens == 0 else "samples"
        raise MtError(empty[0].prefix, f"has no {what} to draw from", "leave it out, or give its split a larger share")
    counts = _count_samples(sources, samples, cut)
    return [
        SourcePlan(source, count / max(1, sum(counts)), count, source.count_epochs(count, cut))
        for source, count in zip(sources, counts, strict=True)
    ]


def _count_samples(sources: Sequence[Source], samples: int, cut: StreamSampling) -> list[int]:
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights and len(sources) == 1:
        return [samples]
    if not weights:
        weights = [float(source.count_per_epoch(cut)) for source in sources]
        if samples > sum(weights):
            raise MtError(
                "data.paths",
                f"hold {sum(weights):,.0f} samples in one epoch, the run wants {samples:,}",
                "give each path a weight, so that they are repeated, or train for fewer samples",
            )
    dataset, _ = blend_by_weights(weights, samples)
    return np.bincount(dataset, minlength=len(sources)).tolist()
