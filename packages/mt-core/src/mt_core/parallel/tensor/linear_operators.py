"""Operators of linear layers cut over an axis: products that overlap with the communication that the cut needs.

Forward, a rank multiplies its local part of the sequence while the others' parts arrive, and sends each rank its part
of the result while the next is computed. They are operators of torch's library, so a compiled layer stays one graph
around them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mt_core.distributed.mesh import Axis, find_axis
from mt_core.parallel.tensor import collectives
from mt_core.parallel.tensor.weight_gradients import find_sum

SEQUENCE = 1
"""The dim of activations that sequence parallelism cuts."""


@torch.library.custom_op("mt::column_linear", mutates_args=())
def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, sequence: bool) -> Tensor:
    """Product with a weight cut along the outputs: [B, T / n, in] to [B, T, out / n], or without `sequence` from
    [B, T, in]."""
    return _all_gather_matmul(x, weight.mT, bias, find_axis(group))[0] if sequence else F.linear(x, weight, bias)


@column_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, sequence: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * _count_parts(group, sequence), weight.shape[0])


@torch.library.custom_op("mt::column_linear_backward", mutates_args=())
def column_linear_backward(
    g: Tensor, x: Tensor | None, weight: Tensor | None, group: str, sequence: bool, number: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; without the weight none of x, without x none of the weight: they are empty.

    x is gathered again during the product for its gradient, which is summed during the product for the weight's. With
    the number of a `WeightSum` the weight's is added to that, now or later, and the anchor's gradient returned.
    """
    axis = find_axis(group)
    if _postpone(number, x, lambda: column_linear_backward(g, x, None, group, sequence, number)):
        return _input_gradient_async(g, weight, axis, sequence)(), g.new_zeros(1)
    gathered = collectives.all_gather_async(x, axis, SEQUENCE) if x is not None and sequence else lambda: x
    g_x = _input_gradient_async(g, weight, axis, sequence)
    g_weight = _weight_gradient(g, gathered(), number)
    return g_x(), g_weight


def _input_gradient_async(g: Tensor, weight: Tensor | None, axis: Axis, sequence: bool) -> collectives.Handle:
    if weight is None:
        return lambda: g.new_empty(0)
    g_x = g @ weight
    return (
        collectives.reduce_scatter_async(g_x, axis, SEQUENCE) if sequence else collectives.all_reduce_async(g_x, axis)
    )


@column_linear_backward.register_fake
def _(
    g: Tensor, x: Tensor | None, weight: Tensor | None, group: str, sequence: bool, number: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(g, x, weight, g.shape[1] // _count_parts(group, sequence), number)


@torch.library.custom_op("mt::row_linear", mutates_args=())
def row_linear(x: Tensor, weight: Tensor, group: str, sequence: bool) -> Tensor:
    """Sum over ranks of products with a weight cut along the inputs: [B, T, in / n] to [B, T / n, out], or without
    `sequence` to [B, T, out]."""
    axis = find_axis(group)
    return (
        _matmul_reduce_scatter(x, weight, axis)
        if sequence
        else collectives.all_reduce_async(F.linear(x, weight), axis)()
    )


@row_linear.register_fake
def _(x: Tensor, weight: Tensor, group: str, sequence: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // _count_parts(group, sequence), weight.shape[0])


@torch.library.custom_op("mt::row_linear_backward", mutates_args=())
def row_linear_backward(
    g: Tensor, x: Tensor | None, weight: Tensor | None, group: str, sequence: bool, number: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, as those of `column_linear_backward`."""
    axis, g_x, whole = find_axis(group), g.new_empty(0), g
    postponed = _postpone(number, x, lambda: row_linear_backward(g, x, None, group, sequence, number))
    if weight is not None:
        g_x, whole = _all_gather_matmul(g, weight, None, axis) if sequence else (g @ weight, g)
    elif sequence:
        whole = collectives.all_gather_async(g, axis, SEQUENCE)()
    return g_x, g.new_zeros(1) if postponed else _weight_gradient(whole, x, number)


@row_linear_backward.register_fake
def _(
    g: Tensor, x: Tensor | None, weight: Tensor | None, group: str, sequence: bool, number: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(g, x, weight, g.shape[1] * _count_parts(group, sequence), number)


def _postpone(number: Tensor | None, x: Tensor | None, product: Callable[[], object]) -> bool:
    return number is not None and x is not None and find_sum(number).postpone(product)


def _weight_gradient(g: Tensor, x: Tensor | None, number: Tensor | None) -> Tensor:
    """Return the gradient of the weight, empty without x; with a number add it to the sum and return the anchor's."""
    if x is None:
        return g.new_empty(0)
    g_MO, x_MI = g.flatten(0, -2), x.flatten(0, -2)
    if number is None:
        return g_MO.mT @ x_MI
    find_sum(number).add(g_MO, x_MI)
    return g.new_zeros(1)


def _empty_gradients(
    g: Tensor, x: Tensor | None, weight: Tensor | None, length: int, number: Tensor | None
) -> tuple[Tensor, Tensor]:
    g_x = g.new_empty(0) if weight is None else g.new_empty(g.shape[0], length, weight.shape[1])
    if x is None:
        return g_x, g.new_empty(0)
    return g_x, g.new_empty(1) if number is not None else g.new_empty(g.shape[-1], x.shape[-1])


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
    return *_needed_gradients(ctx, column_linear_backward, g), g_bias, None, None


def _save_row(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.group, ctx.sequence = inputs
    _save_needed(ctx, x, weight)


def _row_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return *_needed_gradients(ctx, row_linear_backward, g), None, None


def _save_needed(ctx: Any, x: Tensor, weight: Tensor) -> None:
    """Save x only for the gradient of the weight, and the weight only for that of x."""
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)


def _needed_gradients(ctx: Any, backward: Callable[..., tuple[Tensor, Tensor]], g: Tensor) -> list[Tensor | None]:
    """Compute the gradients of x and of the weight, None where the tensor is frozen or needs none."""
    gradients = backward(g, *ctx.saved_tensors, ctx.group, ctx.sequence)
    return [gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False)]


column_linear.register_autograd(_column_gradients, setup_context=_save_column)
row_linear.register_autograd(_row_gradients, setup_context=_save_row)
