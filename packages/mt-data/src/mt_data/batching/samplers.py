"""The orders in which data-parallel ranks read a dataset: `single`, `sequential`, `cyclic`, `cyclic-unsharded`.

A position in a run is one integer, the samples that all ranks have consumed. Under `single` (docs/specs/data.md §6.1),
one pass over the samples in the order of the dataset, it stays valid with other ranks or batch sizes. Under `cyclic`
(docs/specs/data.md §6.2), shuffled anew in each epoch with the epoch's number as the seed, it means the same samples
only with the same ranks and micro-batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from mt_core.errors import MtError
from mt_core.plugins import did_you_mean

RANDPERM_LIMIT = 2**32 // 20
"""From this many elements on, torch draws otherwise."""
EpochOrder = Callable[[int, int], list[int]]
"""From an epoch and how many of its samples are consumed to this rank's samples of the rest of it."""


@dataclass(frozen=True, slots=True)
class DataParallelRank:
    """One rank among the data-parallel ranks."""

    micro_batch: int
    """Samples in a micro-batch of one rank."""
    data_rank: int = 0
    data_size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.data_rank < self.data_size
        assert self.micro_batch > 0

    @property
    def group(self) -> int:
        """Samples that all ranks read together: a micro-batch each."""
        return self.micro_batch * self.data_size

    def slice_group(self, group: range) -> range:
        """This rank's part of a group; short or empty where the group is."""
        return group[self.data_rank * self.micro_batch : (self.data_rank + 1) * self.micro_batch]


def check_position(total: int, consumed: int) -> None:
    """Refuse a position behind the end of the dataset."""
    if consumed > total:
        raise MtError("data", f"{consumed} samples are consumed, the dataset has {total}", "the dataset it began with")


def randperm(count: int, seed: int) -> list[int]:
    """The permutation of `range(count)` that a torch generator of this seed draws first.

    At step i elements i and i + draw mod (count − i) change places. A Python loop: 0.5 s a million.
    """
    if count >= RANDPERM_LIMIT:
        raise MtError(
            "data", f"{count} samples to shuffle at once", f'less than {RANDPERM_LIMIT} a rank, or the order "single"'
        )
    generator = np.random.MT19937()
    generator._legacy_seeding(seed)  # pyright: ignore[reportAttributeAccessIssue] - as RandomState(seed) and torch
    places = np.arange(max(count - 1, 0))
    chosen = generator.random_raw(len(places)).astype(np.int64) % (count - places) + places
    order = list(range(count))
    for place, other in enumerate(chosen.tolist()):
        order[place], order[other] = order[other], order[place]
    return order


def single(total: int, consumed: int, rank: DataParallelRank) -> Iterator[range]:
    """Sample numbers of each of this rank's micro-batches; a last group too small for all ranks is dropped."""
    return sequential(total - (total - consumed) % rank.group if consumed < total else total, consumed, rank)


def sequential(total: int, consumed: int, rank: DataParallelRank) -> Iterator[range]:
    """Sample numbers of each of this rank's micro-batches; each sample once, for evaluation.

    Unlike `single` it keeps an incomplete last group. Every rank yields equally often; its part of that group may be
    short or empty.
    """
    check_position(total, consumed)
    return (
        rank.slice_group(range(start, min(start + rank.group, total))) for start in range(consumed, total, rank.group)
    )


def cyclic(total: int, consumed: int, rank: DataParallelRank) -> Iterator[list[int]]:
    """Sample numbers of each of this rank's micro-batches; each rank shuffles its own stretch of the dataset."""
    bucket = total // rank.group * rank.micro_batch

    def epoch_order(epoch: int, begun: int) -> list[int]:
        first = rank.data_rank * bucket
        return [first + sample for sample in randperm(bucket, epoch)[begun // rank.data_size :]]

    return _iterate_epochs(total, consumed, rank, epoch_order)


def cyclic_unsharded(total: int, consumed: int, rank: DataParallelRank) -> Iterator[list[int]]:
    """Sample numbers of each of this rank's micro-batches; the ranks take turns in one shuffle of the whole dataset."""
    whole = total // rank.micro_batch * rank.micro_batch

    def epoch_order(epoch: int, begun: int) -> list[int]:
        return randperm(whole, epoch)[begun:][rank.data_rank :: rank.data_size]

    return _iterate_epochs(total, consumed, rank, epoch_order)


def _iterate_epochs(total: int, consumed: int, rank: DataParallelRank, order: EpochOrder) -> Iterator[list[int]]:
    epoch_samples = total - total % rank.group
    if not epoch_samples:
        raise MtError(
            "data", f"{total} samples do not fill one micro-batch of every rank", f"at least {rank.group} samples"
        )
    first, begun = divmod(consumed, epoch_samples)
    if begun % rank.group:
        raise MtError(
            "data",
            f"position {consumed} is {begun} samples into epoch {first}, no multiple of micro-batch × ranks, "
            f"{rank.group}",
            "the cyclic order resumes with the ranks and micro-batch it began with",
        )
    return _iterate_batches(first, begun, rank.micro_batch, order)


def _iterate_batches(first: int, begun: int, micro_batch: int, order: EpochOrder) -> Iterator[list[int]]:
    for epoch in count(first):
        samples = order(epoch, begun if epoch == first else 0)
        for start in range(0, len(samples) - micro_batch + 1, micro_batch):
            yield samples[start : start + micro_batch]


Sampler = Callable[[int, int, DataParallelRank], Iterator[Sequence[int]]]
"""From samples in the dataset, samples consumed by all ranks and this rank's rank to its micro-batches."""


SAMPLERS: Mapping[str, Sampler] = {
    "single": single,
    "sequential": sequential,
    "cyclic": cyclic,
    "cyclic-unsharded": cyclic_unsharded,
}


def get_sampler(name: str) -> Sampler:
    """The sampler registered under a name."""
    if name not in SAMPLERS:
        raise MtError("order", f"unknown name {name!r}", did_you_mean(name, SAMPLERS))
    return SAMPLERS[name]
