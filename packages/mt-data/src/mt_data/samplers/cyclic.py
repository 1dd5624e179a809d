"""Megatron's `cyclic` order: shuffled anew each epoch, without end (docs/specs/data.md §6.2).

The seed of an epoch is its number and nothing else. The position stays one integer, but unlike that of `single` it
means the same samples only with the same ranks and micro-batch.
"""

from collections.abc import Callable, Iterator
from itertools import count

from mt_core.errors import MtError
from mt_data.samplers.permutation import randperm
from mt_data.samplers.share import Share

Order = Callable[[int, int], list[int]]
"""From an epoch and how many of its samples are consumed to this rank's samples of the rest of it."""


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
