"""Differentiable collectives. Each is the transpose of another; on an axis of size 1 all are the identity.

| forward                                        | backward                    |
| ---------------------------------------------- | --------------------------- |
| `copy_to_tensor_parallel`: nothing             | all-reduce                  |
| `reduce_from_tensor_parallel`: all-reduce      | nothing                     |
| `all_gather`                                   | reduce-scatter              |
| `reduce_scatter`                               | all-gather                  |
| `scatter_to_tensor_parallel`: keep local shard | all-gather                  |
| `gather_from_tensor_parallel`: all-gather      | keep the local shard        |

`all_gather` is for shards whose gradients differ between ranks, `gather_from_tensor_parallel` for those whose gradients
are equal. The functions that end in `_async` are not differentiable: they begin a collective and return its handle.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mt_core.distributed.mesh import Axis

Transfer = Callable[[Tensor], Tensor]
Handle = Callable[[], Tensor]
"""Waits for a collective that was begun, and returns its result."""


def all_gather_async(x: Tensor, axis: Axis, dim: int) -> Handle:
    """Begin to concatenate the shards of all ranks along `dim`, in the order of the ranks."""
    if axis.size == 1:
        return lambda: x
    dim %= x.dim()
    shards = x.new_empty(axis.size, *x.shape)
    work = dist.all_gather_into_tensor(shards.view(-1), x.contiguous().view(-1), group=axis.group, async_op=True)
    return _make_handle(work, lambda: shards.movedim(0, dim).flatten(dim, dim + 1))


def all_reduce_async(x: Tensor, axis: Axis) -> Handle:
    """Begin to sum over the axis; the result is a new tensor unless the axis has one rank."""
    if axis.size == 1:
        return lambda: x
    total = x.clone(memory_format=torch.contiguous_format)
    return _make_handle(dist.all_reduce(total, group=axis.group, async_op=True), lambda: total)


def reduce_scatter_async(x: Tensor, axis: Axis, dim: int) -> Handle:
    """Begin to sum over the axis and split the sum along `dim`; the result is this rank's shard."""
    if axis.size == 1:
        return lambda: x
    shards = x.unflatten(dim, (axis.size, -1)).movedim(dim % x.dim(), 0).contiguous()
    shard = torch.empty_like(shards[0])
    work = dist.reduce_scatter_tensor(shard.view(-1), shards.view(-1), group=axis.group, async_op=True)
    return _make_handle(work, lambda: shard)


def send_recv_async(x: Tensor, axis: Axis, step: int, *, out: Tensor) -> Handle:
    """Begin to send to the rank `step` places further on, and to fill `out` from the rank `step` places before."""
    send = dist.P2POp(dist.isend, x, group=axis.group, group_peer=(axis.rank + step) % axis.size)
    receive = dist.P2POp(dist.irecv, out, group=axis.group, group_peer=(axis.rank - step) % axis.size)
    works = dist.batch_isend_irecv([send, receive])

    def wait(_sent: Tensor = x) -> Tensor:  # the default argument keeps `x` alive until the send completes
        for work in works:
            work.wait()
        return out

    return wait


def _make_handle(work: dist.Work | None, result: Callable[[], Tensor]) -> Handle:
    def wait() -> Tensor:
        if work is not None:
            work.wait()
        return result()

    return wait


def local_shard(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Return this rank's part of an equal split along `dim`, contiguous. Not differentiable."""
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


def _identity(x: Tensor) -> Tensor:
    return x.view_as(x)


def copy_to_tensor_parallel(x: Tensor, axis: Axis) -> Tensor:
    """Pass a replicated tensor on to work that is split over the axis; its gradient is summed."""
    return _apply(x, axis, _identity, lambda g: all_reduce_async(g, axis)())


def reduce_from_tensor_parallel(x: Tensor, axis: Axis) -> Tensor:
    """Sum partial sums over the axis, on every rank."""
    return _apply(x, axis, lambda t: all_reduce_async(t, axis)(), _identity)


def all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Concatenate shards for work that is split over the axis: the gradient is summed and split."""
    return _apply(x, axis, lambda t: all_gather_async(t, axis, dim)(), lambda g: reduce_scatter_async(g, axis, dim)())


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Sum partial sums over the axis and keep this rank's shard of the sum."""
    return _apply(x, axis, lambda t: reduce_scatter_async(t, axis, dim)(), lambda g: all_gather_async(g, axis, dim)())


def scatter_to_tensor_parallel(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Keep this rank's shard of a replicated tensor."""
    return _apply(x, axis, lambda t: local_shard(t, axis, dim), lambda g: all_gather_async(g, axis, dim)())


def gather_from_tensor_parallel(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Concatenate shards for work that every rank repeats: the gradient is split."""
    return _apply(x, axis, lambda t: all_gather_async(t, axis, dim)(), lambda g: local_shard(g, axis, dim))
