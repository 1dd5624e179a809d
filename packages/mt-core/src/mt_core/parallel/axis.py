"""One mesh axis as this rank sees it. An axis of size 1 has no group, and every collective on it is the identity."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Axis:
    """A named line of ranks: this rank's place, their number, and the group that connects them."""

    name: str
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the axis, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Largest of each element over the axis, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a contiguous tensor to the rank at place `to` of the axis."""
        dist.send(tensor, group=self.group, group_dst=to)

    def receive_(self, tensor: Tensor, source: int) -> Tensor:
        """Fill a contiguous tensor with what the rank at place `source` of the axis sends."""
        dist.recv(tensor, group=self.group, group_src=source)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank of the axis."""
        if self.size > 1:
            dist.barrier(group=self.group)
