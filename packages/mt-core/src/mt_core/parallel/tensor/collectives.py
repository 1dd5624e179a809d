"""Differentiable collectives. Each is the transpose of another; on an axis of size 1 all are the identity.

| forward                    | backward                   |
| -------------------------- | -------------------------- |
| `copy`: nothing            | sum                        |
| `reduce`: sum              | nothing                    |
| `gather`: join the parts   | sum, keep the own part     |
| `reduce_scatter`           | `gather`                   |
| `split`: keep the own part | join the parts             |
| `join`: join the parts     | keep the own part          |

`gather` is for parts whose gradients differ between ranks, `join` for those whose gradients are equal.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mt_core.distributed.mesh import Axis

Transfer = Callable[[Tensor], Tensor]
Pending = Callable[[], Tensor]
"""Waits for a collective that was begun, and returns what it gives."""


def start_joined(x: Tensor, axis: Axis, dim: int) -> Pending:
    """Begin to join the parts of all ranks along `dim`, in the order of the ranks; call the result for the whole."""
    if axis.size == 1:
        return lambda: x
    dim %= x.dim()
    parts = x.new_empty(axis.size, *x.shape)
    work = dist.all_gather_into_tensor(parts.view(-1), x.contiguous().view(-1), group=axis.group, async_op=True)
    return _pending(work, lambda: parts.movedim(0, dim).flatten(dim, dim + 1))


def start_summed(x: Tensor, axis: Axis) -> Pending:
    """Begin to sum over the axis; call the result for the sum, a new tensor unless the axis has one rank."""
    if axis.size == 1:
        return lambda: x
    total = x.clone(memory_format=torch.contiguous_format)
    return _pending(dist.all_reduce(total, group=axis.group, async_op=True), lambda: total)


def start_summed_part(x: Tensor, axis: Axis, dim: int) -> Pending:
    """Begin to sum over the axis and cut along `dim`; call the result for this rank's part."""
    if axis.size == 1:
        return lambda: x
    parts = x.unflatten(dim, (axis.size, -1)).movedim(dim % x.dim(), 0).contiguous()
    part = torch.empty_like(parts[0])
    work = dist.reduce_scatter_tensor(part.view(-1), parts.view(-1), group=axis.group, async_op=True)
    return _pending(work, lambda: part)


def start_shifted(x: Tensor, axis: Axis, step: int, *, out: Tensor) -> Pending:
    """Begin to send to the rank `step` places on, and to fill `out` with what the one as far before sends."""
    send = dist.P2POp(dist.isend, x, group=axis.group, group_peer=(axis.rank + step) % axis.size)
    receive = dist.P2POp(dist.irecv, out, group=axis.group, group_peer=(axis.rank - step) % axis.size)
    works = dist.batch_isend_irecv([send, receive])

    def wait(sent: Tensor = x) -> Tensor:  # which must live until now
        for work in works:
            work.wait()
        return out

    return wait


def _pending(work: dist.Work | None, result: Callable[[], Tensor]) -> Pending:
    def wait() -> Tensor:
        if work is not None:
            work.wait()
        return result()

    return wait


def own(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part of an equal split along `dim`, contiguous. Not differentiable."""
    return x.chunk(axis.size, dim)[axis.rank].contiguous()


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Transfer, back: Transfer) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]), None, None


def _apply(x: Tensor, axis: Axis, there: Transfer, back: Transfer) -> Tensor:
    return x if axis.size == 1 else _Collective.apply(x, there, back)  # pyright: ignore[reportReturnType]


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def copy(x: Tensor, axis: Axis) -> Tensor:
    """A replicated tensor into work that is split over the axis; its gradient is summed."""
    return _apply(x, axis, _same, lambda g: start_summed(g, axis)())


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums to their sum on every rank."""
    return _apply(x, axis, lambda t: start_summed(t, axis)(), _same)


def gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Parts to the whole, for work that is split over the axis: the gradient is summed and cut."""
    return _apply(x, axis, lambda t: start_joined(t, axis, dim)(), lambda g: start_summed_part(g, axis, dim)())


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Partial sums to this rank's part of their sum."""
    return _apply(x, axis, lambda t: start_summed_part(t, axis, dim)(), lambda g: start_joined(g, axis, dim)())


def split(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """A replicated tensor to this rank's part of it."""
    return _apply(x, axis, lambda t: own(t, axis, dim), lambda g: start_joined(g, axis, dim)())


def join(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Parts to the whole, for work that every rank repeats: the gradient is cut."""
    return _apply(x, axis, lambda t: start_joined(t, axis, dim)(), lambda g: own(g, axis, dim))
