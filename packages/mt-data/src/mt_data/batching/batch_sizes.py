"""Global batch sizes that grow during a run: pure functions of the samples consumed (docs/specs/data.md §6.6).

The position stays one integer: a larger batch takes more of the same micro-batches, in the same order.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mt_core.config.sections import BatchConfig
from mt_core.errors import MtError, Problem, raise_if

SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
STEP_ENTRY = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?):(\d+)")
GRAMMAR = 'steps as "0:64 10M:128": where they begin, in samples or tokens (K, M, B, T), and the batch from there on'


class BatchSizes(Protocol):
    """The global batch size over a run."""

    def size_after(self, consumed: int) -> int:
        """Samples in the step that begins after `consumed` samples."""
        ...

    def sizes(self) -> Sequence[int]:
        """Every size that occurs, in order."""
        ...


@dataclass(frozen=True, slots=True)
class ConstantBatchSize:
    """One size for the whole run."""

    size: int

    def size_after(self, consumed: int) -> int:
        """The size, whatever was consumed."""
        return self.size

    def sizes(self) -> Sequence[int]:
        """The only size."""
        return (self.size,)


@dataclass(frozen=True, slots=True)
class RampedBatchSize:
    """Megatron 0.11's `--rampup-batch-size START INCREMENT SAMPLES`: equal increments over the first samples."""

    start: int
    increment: int
    samples: int
    """Samples that the ramp lasts; every later step takes the full batch."""
    full: int
    """Size after the ramp."""

    def __post_init__(self) -> None:
        raise_if(self._problems())

    def _problems(self) -> Iterator[Problem]:
        where = "batch.rampup"
        if min(self.start, self.increment, self.samples) < 1:
            actual = f"start {self.start}, increment {self.increment}, samples {self.samples}"
            yield Problem(where, actual, "all of them at least 1")
        elif self.start >= self.full:
            yield Problem(where, f"start {self.start} is not below the full batch", f"less than {self.full}")
        elif (self.full - self.start) % self.increment:
            actual = f"{self.full} − {self.start} is no multiple of the increment {self.increment}"
            yield Problem(where, actual, f"an increment that divides {self.full - self.start}")

    def size_after(self, consumed: int) -> int:
        """The size on the ramp; computed in floats as in Megatron, so that the steps fall on the same samples."""
        if consumed > self.samples:
            return self.full
        between = self.samples / ((self.full - self.start) // self.increment)
        return min(self.full, self.start + self.increment * int(consumed / between))

    def sizes(self) -> Sequence[int]:
        """All sizes from the start to the full batch."""
        return range(self.start, self.full + 1, self.increment)


@dataclass(frozen=True, slots=True)
class SteppedBatchSize:
    """Newer Megatron's `--step-batch-size-schedule`: a size from each threshold on."""

    thresholds: tuple[int, ...]
    """Samples at which each size begins; the first is 0, and they increase."""
    batches: tuple[int, ...]

    def size_after(self, consumed: int) -> int:
        """The size of the last threshold that is reached."""
        return next(b for t, b in zip(self.thresholds[::-1], self.batches[::-1], strict=True) if t <= consumed)

    def sizes(self) -> Sequence[int]:
        """The sizes in the order of their thresholds."""
        return self.batches


def make_batch_sizes(batch: BatchConfig) -> BatchSizes:
    """Build the batch sizes of a configuration: constant, a ramp, or given steps."""
    if batch.rampup:
        start, increment, samples = batch.rampup
        return RampedBatchSize(start, increment, samples, batch.global_batch)
    return parse_steps(batch.sizes) if batch.sizes else ConstantBatchSize(batch.global_batch)


def parse_steps(text: str, *, seq_length: int | None = None) -> SteppedBatchSize:
    """`"0:64 10M:128"` as a schedule. Thresholds are samples or, with a sequence length, tokens."""
    where = "batch.sizes"
    entries = [STEP_ENTRY.fullmatch(entry) for entry in text.replace(",", " ").split()]
    if not entries or None in entries:
        raise MtError(where, repr(text), GRAMMAR)
    parsed = [(int(float(e[1]) * SUFFIXES[e[2]]) // (seq_length or 1), int(e[3])) for e in entries if e]
    thresholds, batches = zip(*sorted(parsed), strict=True)
    if thresholds[0] != 0:
        raise MtError(where, f"the first step of {text!r} begins at {thresholds[0]} samples", "a step that begins at 0")
    if len(set(thresholds)) < len(thresholds):
        raise MtError(where, f"two steps of {text!r} begin at the same sample", "each a threshold of its own")
    if min(batches) < 1:
        raise MtError(where, f"{text!r} has a batch of 0", "sizes of at least 1")
    return SteppedBatchSize(thresholds, batches)


def check_sizes(sizes: BatchSizes, group: int) -> None:
    """Refuse sizes that micro-batch × ranks, the `group`, does not divide."""
    if bad := [size for size in sizes.sizes() if size % group]:
        raise MtError(
            "batch", f"sizes {', '.join(map(str, bad[:5]))} are no multiples of micro-batch × ranks = {group}"
        )


def count_samples(sizes: BatchSizes, steps: int, *, consumed: int = 0) -> int:
    """Number of samples that are consumed after `steps` more steps, where `consumed` were before."""
    if isinstance(sizes, ConstantBatchSize):
        return consumed + steps * sizes.size
    for _ in range(steps):
        consumed += sizes.size_after(consumed)
    return consumed
