"""Experts on other ranks: tokens travel to the ranks that hold their experts, and the results back.

Every rank of the expert axis has an equal, contiguous part of the experts. Counts go first, since they say how many
rows a rank gets from each other; nothing is dropped, and a rank may get none.

Shape suffixes: D model size, E experts, e those of this rank, n ranks, M rows of this rank's tokens in the order of
their experts, R rows that reach this rank's experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mt_core.distributed.mesh import Axis
from mt_core.parallel.expert.permutation import invert_permutation, permute, sort_by_expert

Experts = Callable[[Tensor, Tensor], Tensor]
"""Rows in the order of their experts, and the number of each expert's, to as many rows."""
Dispatch = Callable[[Tensor, Tensor, Experts], Tensor]
"""Maps rows [M, D] and counts [E] of all experts to results, given the function that runs the experts of this rank."""


def dispatch(x_MD: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
    """Each row through its expert; all experts are here."""
    return experts(x_MD, counts_E)


@dataclass(frozen=True, slots=True)
class ExpertDispatch:
    """`dispatch` with the experts cut over the axis (arXiv:2006.16668): one exchange there and one back."""

    axis: Axis
    traceable: ClassVar[bool] = False

    def __call__(self, x_MD: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
        """[M, D] to the same shape and order; the host waits for the counts."""
        counts_ne = counts_E.view(self.axis.size, -1)
        theirs_ne = torch.empty_like(counts_ne)
        dist.all_to_all_single(theirs_ne, counts_ne.contiguous(), group=self.axis.group)
        sent, received = torch.stack((counts_ne.sum(1), theirs_ne.sum(1))).tolist()
        x_RD = exchange(x_MD, self.axis, sent, received)
        order_R = sort_by_expert(theirs_ne, sum(received))
        back_R = invert_permutation(order_R)
        y_RD = permute(experts(permute(x_RD, order_R, back_R), theirs_ne.sum(0)), back_R, order_R)
        return exchange(y_RD, self.axis, received, sent)


def exchange(x_MD: Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """The first sent[0] rows go to rank 0 and so on; the result's first received[0] rows came from there. It is the
    transpose of the exchange with the two swapped."""
    return _Exchange.apply(x_MD, axis, sent, received)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return _exchange(x_MD, axis, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchange(gradients[0], ctx.axis, ctx.received, ctx.sent), None, None, None


def _exchange(x_MD: Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    y_RD = x_MD.new_empty(sum(received), *x_MD.shape[1:])
    dist.all_to_all_single(y_RD, x_MD.contiguous(), [*received], [*sent], group=axis.group)
    return y_RD
