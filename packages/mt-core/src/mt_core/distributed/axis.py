"""One mesh axis as this rank sees it. An axis of size 1 has no group, and every collective on it is the identity."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.distributed_c10d import GroupName


@dataclass(frozen=True, slots=True)
class Axis:
    """A named line of ranks: this rank's place, their number, and the group that connects them."""

    name: str
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def group_name(self) -> str:
        """The name under which operators find the group again."""
        assert self.group is not None
        return self.group.group_name

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


def axis_named(group_name: str) -> Axis:
    """The axis whose group has this name."""
    group = _resolve_process_group(GroupName(group_name))
    return Axis("", group.rank(), group.size(), group)
