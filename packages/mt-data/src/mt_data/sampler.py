"""Which samples a data-parallel rank reads: Megatron's `single` order (spec/data.md §6.1).

The position is one integer, the samples consumed by all ranks so far; it stays valid with other ranks or batch sizes.
"""

from collections.abc import Iterator

from mt_core.errors import MtError


def sample_ids(
    total: int, *, consumed: int, micro_batch: int, data_rank: int = 0, data_size: int = 1
) -> Iterator[range]:
    """Sample numbers of each of this rank's micro-batches; a last group too small for all ranks is dropped."""
    assert 0 <= data_rank < data_size
    if consumed > total:
        raise MtError("data", f"{consumed} samples are consumed, the dataset has {total}", "the dataset it began with")
    group = micro_batch * data_size
    for start in range(consumed, total - group + 1, group):
        first = start + data_rank * micro_batch
        yield range(first, first + micro_batch)
