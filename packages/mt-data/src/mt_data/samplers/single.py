"""Megatron's `single` order, one pass over the samples as they stand, and `sequential`, which drops none of them.

The position is the samples consumed by all ranks so far; it stays valid with other ranks or batch sizes.

Source: docs/specs/data.md §6.1.
"""

from collections.abc import Iterator

from mt_data.samplers.share import Share, check_position


def single(total: int, consumed: int, share: Share) -> Iterator[range]:
    """Sample numbers of each of this rank's micro-batches; a last group too small for all ranks is dropped."""
    return sequential(total - (total - consumed) % share.group if consumed < total else total, consumed, share)


def sequential(total: int, consumed: int, share: Share) -> Iterator[range]:
    """As `single`, with the last group however small: each sample once, for evaluation.

    Every rank yields as often as the others; of an incomplete group its part may be short or empty.
    """
    check_position(total, consumed)
    return (share.of(range(start, min(start + share.group, total))) for start in range(consumed, total, share.group))
