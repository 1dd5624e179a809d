"""Exchanges between ranks that are begun in one place of a layer and finished in another, forward and backward.

What a layer computes between the two runs while bytes travel; its gradients do so in the backward pass, where the
transposed exchange begins where the other ended.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mt_core.distributed.mesh import Axis
from mt_core.parallel.tensor.collectives import Handle, all_gather_async, reduce_scatter_async


class Exchange:
    """A linear exchange and its transpose, one use of each in a forward and a backward pass."""

    def __init__(self, there: Callable[[Tensor], Handle], back: Callable[[Tensor], Handle]) -> None:
        self._there, self._back = there, back
        self._pending: Handle | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Exchange, with nothing in between."""
        return self.finish(self.begin(x))

    def begin(self, x: Tensor) -> Tensor:
        """Begin to exchange; return a scalar that stands for the result, which `finish` takes."""
        return _Begin.apply(x, self)  # pyright: ignore[reportReturnType]

    def finish(self, token: Tensor) -> Tensor:
        """Wait for the result."""
        return _Finish.apply(token, self)  # pyright: ignore[reportReturnType]

    def start(self, x: Tensor, *, transposed: bool) -> None:
        """Begin one of the two, which nothing else may be under way of."""
        assert self._pending is None
        self._pending = (self._back if transposed else self._there)(x)

    def wait(self) -> Tensor:
        """Return the result of what was begun."""
        assert self._pending is not None
        result, self._pending = self._pending(), None
        return result


class _Context(Protocol):
    exchange: Exchange


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start(x, transposed=False)
        return x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.exchange.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, token: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.exchange.start(gradients[0], transposed=True)
        return gradients[0].new_zeros(()), None


def make_all_to_all(axis: Axis, sent: Sequence[int], received: Sequence[int]) -> Exchange:
    """Make the exchange that sends the first sent[0] rows to rank 0 and so on; the first received[0] rows of the result
    are from there."""
    return Exchange(
        lambda x: all_to_all_async(x, axis, sent, received), lambda g: all_to_all_async(g, axis, received, sent)
    )


def make_all_gather(axis: Axis) -> Exchange:
    """Make the exchange that gives every rank the rows of all; its transpose sums and splits."""
    return Exchange(lambda x: all_gather_async(x, axis, 0), lambda g: reduce_scatter_async(g, axis, 0))


def all_to_all_async(x_MD: Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int]) -> Handle:
    """Begin an exchange of uneven parts; the transpose is the same with `sent` and `received` swapped."""
    x_MD = x_MD.contiguous()
    y_RD = x_MD.new_empty(sum(received), *x_MD.shape[1:])
    work = dist.all_to_all_single(y_RD, x_MD, [*received], [*sent], group=axis.group, async_op=True)

    def wait(_sent: Tensor = x_MD) -> Tensor:  # the default argument keeps what is sent alive
        assert work is not None
        work.wait()
        return y_RD

    return wait


def read_async(x: Tensor) -> Callable[[], list[Any]]:
    """Begin to copy a tensor to the host; the function waits for it alone and returns its `tolist`."""
    if not x.is_cuda:
        return x.tolist
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[Any]:
        arrived.synchronize()
        return host.tolist()

    return read
