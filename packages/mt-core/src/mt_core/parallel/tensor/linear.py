"""Linear layers cut over an axis: `torch.nn.functional.linear` with the communication that the cut needs.

With sequence parallelism x is [B, T / size, …] between the layers; without, every rank has all of it. Products and
communication overlap: forward, a rank multiplies its local part of the sequence while the others' parts arrive, and
sends each rank its part of the result while the next is computed. The products are operators of torch's library, so a
compiled layer stays one graph around them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mt_core.distributed.mesh import Axis, find_axis
from mt_core.parallel.tensor import collectives

SEQUENCE = 1
"""The dim of activations that sequence parallelism cuts."""


@dataclass(frozen=True, slots=True)
class ColumnLinear:
    """Weight and bias are cut along the outputs: whole x in, this rank's outputs out."""

    axis: Axis
    sequence: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, T, in] to [B, T, out of this rank]."""
        if self.axis.size == 1:
            return F.linear(x, weight, bias)
        return _column(x, weight, bias, self.axis.group_name, self.sequence)


@dataclass(frozen=True, slots=True)
class RowLinear:
    """The weight is cut along the inputs: this rank's inputs in, the sum over ranks out; the bias is added once."""

    axis: Axis
    sequence: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, T, in of this rank] to [B, T, out]."""
        y = F.linear(x, weight) if self.axis.size == 1 else _row(x, weight, self.axis.group_name, self.sequence)
        return y if bias is None else y + bias


@dataclass(frozen=True, slots=True)
class VocabLinear:
    """The output layer with its rows cut over the axis: whole x in, all logits out, equal on every rank."""

    axis: Axis
    sequence: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, T, in] to [B, T, out]."""
        return collectives.gather_from_tensor_parallel(
            ColumnLinear(self.axis, self.sequence)(x, weight, bias), self.axis, -1
        )


@dataclass(frozen=True, slots=True)
class VocabEmbedding:
    """`torch.nn.functional.embedding` with the rows of the table cut over the axis."""

    axis: Axis
    sequence: bool

    def __call__(self, indices: Tensor, weight: Tensor) -> Tensor:
        """[B, T] to [B, T, size]."""
        local = indices - self.axis.rank * weight.shape[0]
        inside = (local >= 0) & (local < weight.shape[0])
        y = F.embedding(local.where(inside, 0), weight).masked_fill(~inside[..., None], 0)
        return (
            collectives.reduce_scatter(y, self.axis, SEQUENCE)
            if self.sequence
            else collectives.reduce_from_tensor_parallel(y, self.axis)
        )


@dataclass(frozen=True, slots=True)
class ColumnEmbedding:
    """`torch.nn.functional.embedding` with the columns of the table cut over the axis: no rank needs another's."""

    axis: Axis
    sequence: bool

    def __call__(self, indices: Tensor, weight: Tensor) -> Tensor:
        """[…] to […, columns of this rank]."""
        return F.embedding(indices, weight)


@dataclass(frozen=True, slots=True)
class SequenceEmbedding:
    """A whole table looked up by this rank's part of the sequence: learned positions."""

    axis: Axis
    sequence: bool

    def __call__(self, indices: Tensor, weight: Tensor) -> Tensor:
        """[…, T] to […, T / size, size of a row]."""
        return F.embedding(collectives.local_shard(indices, self.axis, -1) if self.sequence else indices, weight)


def column_gradients(
    g: Tensor, x: Tensor | None, weight: Tensor | None, axis: Axis, sequence: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight of a `ColumnLinear`; without the weight none of x, without x none of
    the weight: they are empty."""
    return _column_backward(g, x, weight, axis.group_name, sequence)


def row_gradients(
    g: Tensor, x: Tensor | None, weight: Tensor | None, axis: Axis, sequence: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight of a `RowLinear`, as `column_gradients` does."""
    return _row_backward(g, x, weight, axis.group_name, sequence)


@torch.library.custom_op("mt::column_linear", mutates_args=())
def _column(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, sequence: bool) -> Tensor:
    return _all_gather_matmul(x, weight.mT, bias, find_axis(group))[0] if sequence else F.linear(x, weight, bias)


@_column.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, sequence: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * _count_parts(group, sequence), weight.shape[0])


@torch.library.custom_op("mt::column_linear_backward", mutates_args=())
def _column_backward(
    g: Tensor, x: Tensor | None, weight: Tensor | None, group: str, sequence: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; without the weight none of x, without x none of the weight: they are empty.

    x is gathered again during the product for its gradient, which is summed during the product for the weight's.
    """
    axis = find_axis(group)
    gathered = collectives.all_gather_async(x, axis, SEQUENCE) if x is not None and sequence else lambda: x
    g_x = _input_gradient_async(g, weight, axis, sequence)
    whole = gathered()
    g_weight = g.new_empty(0) if whole is None else g.flatten(0, -2).mT @ whole.flatten(0, -2)
    return g_x(), g_weight


def _input_gradient_async(g: Tensor, weight: Tensor | None, axis: Axis, sequence: bool) -> collectives.Handle:
    if weight is None:
        return lambda: g.new_empty(0)
    g_x = g @ weight
    return (
        collectives.reduce_scatter_async(g_x, axis, SEQUENCE) if sequence else collectives.all_reduce_async(g_x, axis)
    )


@_column_backward.register_fake
def _(g: Tensor, x: Tensor | None, weight: Tensor | None, group: str, sequence: bool) -> tuple[Tensor, Tensor]:
    length = g.shape[1] // _count_parts(group, sequence)
    g_x = g.new_empty(0) if weight is None else g.new_empty(g.shape[0], length, weight.shape[1])
    return g_x, g.new_empty(0) if x is None else g.new_empty(g.shape[-1], x.shape[-1])


@torch.library.custom_op("mt::row_linear", mutates_args=())
def _row(x: Tensor, weight: Tensor, group: str, sequence: bool) -> Tensor:
    axis = find_axis(group)
    return (
        _matmul_reduce_scatter(x, weight, axis)
        if sequence
        else collectives.all_reduce_async(F.linear(x, weight), axis)()
    )


@_row.register_fake
def _(x: Tensor, weight: Tensor, group: str, sequence: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // _count_parts(group, sequence), weight.shape[0])


@torch.library.custom_op("mt::row_linear_backward", mutates_args=())
def _row_backward(
    g: Tensor, x: Tensor | None, weight: Tensor | None, group: str, sequence: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; without the weight none of x, without x none of the weight: they are empty."""
    axis, g_x, g_weight = find_axis(group), g.new_empty(0), g.new_empty(0)
    whole = g
    if weight is not None:
        g_x, whole = _all_gather_matmul(g, weight, None, axis) if sequence else (g @ weight, g)
    elif sequence:
        whole = collectives.all_gather_async(g, axis, SEQUENCE)()
    if x is not None:
        g_weight = whole.flatten(0, -2).mT @ x.flatten(0, -2)
    return g_x, g_weight


@_row_backward.register_fake
def _(g: Tensor, x: Tensor | None, weight: Tensor | None, group: str, sequence: bool) -> tuple[Tensor, Tensor]:
    length = g.shape[1] * _count_parts(group, sequence)
    g_x = g.new_empty(0) if weight is None else g.new_empty(g.shape[0], length, weight.shape[1])
    return g_x, g.new_empty(0) if x is None else g.new_empty(g.shape[-1], x.shape[-1])


def _count_parts(group: str, sequence: bool) -> int:
    return find_axis(group).size if sequence else 1


def _all_gather_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> tuple[Tensor, Tensor]:
    """Return (x of all ranks) · weight + bias, and x of all ranks; the local part is multiplied while the others
    arrive."""
    gathered = collectives.all_gather_async(x, axis, SEQUENCE)
    length = x.shape[1]
    y = x.new_empty(x.shape[0], length * axis.size, weight.shape[1])
    local = slice(length * axis.rank, length * (axis.rank + 1))
    _multiply(x, weight, bias, out=y[:, local])
    whole = gathered()
    for others in (slice(0, local.start), slice(local.stop, None)):
        _multiply(whole[:, others], weight, bias, out=y[:, others])
    return y, whole


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    for x_row, out_row in zip(x, out, strict=True):
        if bias is None:
            torch.mm(x_row, weight, out=out_row)
        else:
            torch.addmm(bias, x_row, weight, out=out_row)


def _matmul_reduce_scatter(x: Tensor, weight: Tensor, axis: Axis) -> Tensor:
    """Return this rank's part of the sum over ranks of x · weightᵀ; each rank's part is sent while the next is
    computed."""
    parts = x.unflatten(SEQUENCE, (axis.size, -1))
    sums = x.new_empty(axis.size, x.shape[0], parts.shape[2], weight.shape[0])
    handles = []
    for step in range(1, axis.size):
        part = F.linear(parts[:, (axis.rank + step) % axis.size], weight)
        handles.append(collectives.send_recv_async(part, axis, step, out=sums[(axis.rank - step) % axis.size]))
    _multiply(parts[:, axis.rank], weight.mT, None, out=sums[axis.rank])
    for wait in handles:
        wait()
    return sums.sum(0)


def _save_column(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.group, ctx.sequence = inputs
    _save_needed(ctx, x, weight)


def _column_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    g_bias = g.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
    return *_needed_gradients(ctx, _column_backward, g), g_bias, None, None


def _save_row(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.group, ctx.sequence = inputs
    _save_needed(ctx, x, weight)


def _row_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return *_needed_gradients(ctx, _row_backward, g), None, None


def _save_needed(ctx: Any, x: Tensor, weight: Tensor) -> None:
    """Save x only for the gradient of the weight, and the weight only for that of x."""
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)


def _needed_gradients(ctx: Any, backward: Callable[..., tuple[Tensor, Tensor]], g: Tensor) -> list[Tensor | None]:
    """Compute the gradients of x and of the weight, None where the tensor is frozen or needs none."""
    gradients = backward(g, *ctx.saved_tensors, ctx.group, ctx.sequence)
    return [gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False)]


_column.register_autograd(_column_gradients, setup_context=_save_column)
_row.register_autograd(_row_gradients, setup_context=_save_row)
