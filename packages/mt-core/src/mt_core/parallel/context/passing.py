"""Passing tensors on to the next rank of an axis, around in a ring, while something else is computed."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mt_core.distributed.axis import Axis


@dataclass(frozen=True, slots=True)
class Coming:
    """Tensors on their way to this rank, and those that leave it, which must live until the exchange is over."""

    tensors: tuple[Tensor, ...]
    works: tuple[dist.Work, ...] = ()
    leaving: tuple[Tensor, ...] = ()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, once they are here."""
        for work in self.works:
            work.wait()
        return self.tensors


def pass_on(tensors: tuple[Tensor, ...], axis: Axis) -> Coming:
    """Start to send tensors to the next rank and to receive those of the one before; do not write to them meanwhile."""
    if axis.size == 1:
        return Coming(tensors)
    arriving = tuple(torch.empty_like(x) for x in tensors)
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    sends = [dist.P2POp(dist.isend, x, group=axis.group, group_peer=after) for x in tensors]
    receives = [dist.P2POp(dist.irecv, x, group=axis.group, group_peer=before) for x in arriving]
    return Coming(arriving, tuple(dist.batch_isend_irecv([*sends, *receives])), leaving=tensors)
