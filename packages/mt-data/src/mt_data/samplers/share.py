"""`Share`: which part of every micro-batch group is this rank's."""

from dataclasses import dataclass

from mt_core.errors import MtError


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
