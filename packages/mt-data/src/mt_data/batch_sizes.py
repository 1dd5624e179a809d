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
    """The same size throughout."""

    size: int

    def size_after(self, consumed: int) -> int:
        """The size."""
        return self.size

    def sizes(self) -> Sequence[int]:
        """The one there is."""
        return (self.size,)


@dataclass(frozen=True, slots=True)
class RampedBatchSize:
    """Megatron 0.11's `--rampup-batch-size START INCREMENT SAMPLES`: equal increments over the first samples."""

    start: int
    increment: int
    samples: int
    """Of the ramp: from the first behind them on the batch is full."""
    full: int
    """The size at the end."""

    def __post_init__(self) -> None:
        raise_if(self._problems())

    def _problems(self) -> Iterator[Problem]:
        where = "batch.rampup"
        if min(self.start, self.increment, self.samples) < 1:
            found = f"start {self.start}, increment {self.increment}, samples {self.samples}"
            yield Problem(where, found, "all of them at least 1")
        elif self.start >= self.full:
            yield Problem(where, f"start {self.start} is not below the full batch", f"less than {self.full}")
        elif (self.full - self.start) % self.increment:
            found = f"{self.full} − {self.start} is no multiple of the increment {self.increment}"
            yield Problem(where, found, f"an increment that divides {self.full - self.start}")

    def size_after(self, consumed: int) -> int:
        """The size; floats as Megatron's, so that the steps fall on the same samples."""
        if consumed > self.samples:
            return self.full
        between = self.samples / ((self.full - self.start) // self.increment)
        return min(self.full, self.start + self.increment * int(consumed / between))

    def sizes(self) -> Sequence[int]:
        """From the start to the full batch."""
        return range(self.start, self.full + 1, self.increment)


@dataclass(frozen=True, slots=True)
class SteppedBatchSize:
    """Newer Megatron's `--step-batch-size-schedule`: a size from each threshold on."""

    thresholds: tuple[int, ...]
    """In samples; the first is 0, each greater than the one before."""
    batches: tuple[int, ...]

    def size_after(self, consumed: int) -> int:
        """The size of the last threshold that is reached."""
        return next(b for t, b in zip(self.thresholds[::-1], self.batches[::-1], strict=True) if t <= consumed)

    def sizes(self) -> Sequence[int]:
        """In the order of their thresholds."""
        return self.batches


def make_batch_sizes(batch: BatchConfig) -> BatchSizes:
    """What a configuration says: a constant batch, a ramp, or given sizes."""
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


def micro_batches(sizes: BatchSizes, consumed: int, group: int) -> int:
    """Micro-batches of one rank in the step after `consumed` samples; `group` is micro-batch × ranks."""
    return sizes.size_after(consumed) // group


def check_sizes(sizes: BatchSizes, group: int) -> None:
    """Refuse sizes that micro-batch × ranks, the `group`, does not divide."""
    if bad := [size for size in sizes.sizes() if size % group]:
        raise MtError(
            "batch", f"sizes {', '.join(map(str, bad[:5]))} are no multiples of micro-batch × ranks = {group}"
        )


def rounded_down(size: int, group: int) -> int:
    """`--decrease-batch-size-if-needed`: the largest multiple of micro-batch × ranks that is no larger than `size`."""
    if size < group:
        raise MtError("batch.global_batch", f"{size} is less than micro-batch × ranks = {group}", f"at least {group}")
    return size // group * group


def count_steps(sizes: BatchSizes, train_samples: int) -> int:
    """Steps of a run over so many samples.

    A constant batch and the ramp's full batch drop a last incomplete step, `SteppedBatchSize` takes it, as in Megatron.
    """
    steps = consumed = 0
    if isinstance(sizes, SteppedBatchSize):
        return _count_stepped(sizes, train_samples)
    while isinstance(sizes, RampedBatchSize) and consumed <= min(sizes.samples, train_samples):
        consumed += sizes.size_after(consumed)
        steps += 1
    return steps + max(0, train_samples - consumed) // sizes.sizes()[-1]


def count_samples(sizes: BatchSizes, steps: int) -> int:
    """Samples that so many steps take."""
    if isinstance(sizes, ConstantBatchSize):
        return steps * sizes.size
    consumed = 0
    for _ in range(steps):
        consumed += sizes.size_after(consumed)
    return consumed


def _count_stepped(sizes: SteppedBatchSize, train_samples: int) -> int:
    """Whole stretches of one size at a time, as a run may have millions of steps."""
    steps = consumed = 0
    for end, batch in zip((*sizes.thresholds[1:], train_samples), sizes.batches, strict=True):
        needed = max(0, -(-(min(end, train_samples) - consumed) // batch))
        steps, consumed = steps + needed, consumed + needed * batch
    return steps
