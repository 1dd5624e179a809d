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

LIMIT = 2**32 // 20
"""From this many elements on, torch draws otherwise."""
Order = Callable[[int, int], list[int]]
"""From an epoch and how many of its samples are consumed to this rank's samples of the rest of it."""


@dataclass(frozen=True, slots=True)
class Share:
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

    def of(self, group: range) -> range:
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
    if count >= LIMIT:
        raise MtError("data", f"{count} samples to shuffle at once", f'less than {LIMIT} a rank, or the order "single"')
    generator = np.random.MT19937()
    generator._legacy_seeding(seed)  # pyright: ignore[reportAttributeAccessIssue] - as RandomState(seed) and torch
    places = np.arange(max(count - 1, 0))
    chosen = generator.random_raw(len(places)).astype(np.int64) % (count - places) + places
    order = list(range(count))
    for place, other in enumerate(chosen.tolist()):
        order[place], order[other] = order[other], order[place]
    return order


def single(total: int, consumed: int, share: Share) -> Iterator[range]:
    """Sample numbers of each of this rank's micro-batches; a last group too small for all ranks is dropped."""
    return sequential(total - (total - consumed) % share.group if consumed < total else total, consumed, share)


def sequential(total: int, consumed: int, share: Share) -> Iterator[range]:
    """As `single`, with the last group however small: each sample once, for evaluation.

    Every rank yields as often as the others; of an incomplete group its part may be short or empty.
    """
    check_position(total, consumed)
    return (share.of(range(start, min(start + share.group, total))) for start in range(consumed, total, share.group))


def cyclic(total: int, consumed: int, share: Share) -> Iterator[list[int]]:
    """Sample numbers of each of this rank's micro-batches; each rank shuffles its own stretch of the dataset."""
    bucket = total // share.group * share.micro_batch

    def epoch_order(epoch: int, begun: int) -> list[int]:
        first = share.data_rank * bucket
        return [first + sample for sample in randperm(bucket, epoch)[begun // share.data_size :]]

    return _epochs(total, consumed, share, epoch_order)


def cyclic_unsharded(total: int, consumed: int, share: Share) -> Iterator[list[int]]:
    """As `cyclic`, but the ranks take turns in one shuffled order of the whole dataset."""
    whole = total // share.micro_batch * share.micro_batch

    def epoch_order(epoch: int, begun: int) -> list[int]:
        return randperm(whole, epoch)[begun:][share.data_rank :: share.data_size]

    return _epochs(total, consumed, share, epoch_order)


def _epochs(total: int, consumed: int, share: Share, order: Order) -> Iterator[list[int]]:
    epoch_samples = total - total % share.group
    if not epoch_samples:
        raise MtError(
            "data", f"{total} samples do not fill one micro-batch of every rank", f"at least {share.group} samples"
        )
    first, begun = divmod(consumed, epoch_samples)
    if begun % share.group:
        raise MtError(
            "data",
            f"position {consumed} is {begun} samples into epoch {first}, no multiple of micro-batch × ranks, "
            f"{share.group}",
            "the cyclic order resumes with the ranks and micro-batch it began with",
        )
    return _batches(first, begun, share.micro_batch, order)


def _batches(first: int, begun: int, micro_batch: int, order: Order) -> Iterator[list[int]]:
    for epoch in count(first):
        samples = order(epoch, begun if epoch == first else 0)
        for start in range(0, len(samples) - micro_batch + 1, micro_batch):
            yield samples[start : start + micro_batch]


Sampler = Callable[[int, int, Share], Iterator[Sequence[int]]]
"""From samples in the dataset, samples consumed by all ranks and this rank's share to its micro-batches."""


SAMPLERS: Mapping[str, Sampler] = {
    "single": single,
    "sequential": sequential,
    "cyclic": cyclic,
    "cyclic-unsharded": cyclic_unsharded,
}


def sampler(name: str) -> Sampler:
    """The order of a name."""
    if name not in SAMPLERS:
        raise MtError("order", f"unknown name {name!r}", did_you_mean(name, SAMPLERS))
    return SAMPLERS[name]
