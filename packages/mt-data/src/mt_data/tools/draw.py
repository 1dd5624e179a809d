"""What a run draws from its sources: samples, tokens and epochs of each (spec/data.md §4.1–4.4, §4.12)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mt_core.errors import MtError
from mt_data.blend import sized_blend
from mt_data.indexed.reader import IndexedReader
from mt_data.paths import WeightedPaths
from mt_data.split import SPLITS, split_ranges


@dataclass(frozen=True, slots=True)
class Samples:
    """How samples are cut from a stream of tokens."""

    seq_length: int
    extra: int = 1
    """Tokens that a sample reads behind its own, for the last label."""


@dataclass(frozen=True, slots=True)
class Source:
    """A corpus, or the part of it that belongs to a split."""

    prefix: str
    tokens: int
    weight: float | None = None

    def holds(self, cut: Samples) -> int:
        """Samples of one epoch."""
        return max(0, self.tokens - cut.extra) // cut.seq_length


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is taken from a source."""

    source: Source
    share: float
    """Of all samples."""
    samples: int
    epochs: float
    """How often its tokens are read."""


def weighted_sources(paths: WeightedPaths, tokens: Sequence[int]) -> list[Source]:
    """The sources of a list of paths, of so many tokens each."""
    weights = paths.weights or [None] * len(paths.prefixes)
    return [Source(*row) for row in zip(paths.prefixes, tokens, weights, strict=True)]


def split_tokens(reader: IndexedReader, split: str, number: int) -> int:
    """Tokens of the training (0), validation (1) or test (2) part of a corpus; an empty part is an `MtError`."""
    part = split_ranges(split, len(reader))[number]
    if not part:
        raise MtError(
            f"the {SPLITS[number]} split of {reader.prefix}",
            f"is empty: {len(reader)} sequences, split {split!r}",
            f"a larger share for {SPLITS[number]}",
        )
    return int(reader.lengths[part.start : part.stop].sum(dtype=np.int64))


def draw(sources: Sequence[Source], samples: int, cut: Samples) -> list[Drawn]:
    """What a run of `samples` takes from each source, counted in the very order of the blend.

    With weights, or from a single source, corpora are repeated as needed. Several without weights give at most one
    epoch together; to want more is an `MtError`, as it is when the run begins.
    """
    if empty := [source for source in sources if not source.tokens]:
        raise MtError(empty[0].prefix, "has no tokens to draw from", "leave it out, or give its split a larger share")
    counts = _counts(sources, samples, cut)
    return [
        Drawn(source, count / max(1, sum(counts)), count, count * cut.seq_length / source.tokens)
        for source, count in zip(sources, counts, strict=True)
    ]


def _counts(sources: Sequence[Source], samples: int, cut: Samples) -> list[int]:
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights and len(sources) == 1:
        return [samples]
    if not weights:
        weights = [float(source.holds(cut)) for source in sources]
        if samples > sum(weights):
            raise MtError(
                "data.paths",
                f"hold {sum(weights):,.0f} samples in one epoch, the run wants {samples:,}",
                "give each path a weight, so that they are repeated, or train for fewer samples",
            )
    dataset, _ = sized_blend(weights, samples)
    return np.bincount(dataset, minlength=len(sources)).tolist()
