"""Products of rows with the weights of their experts: one expert after the other, or all in one kernel.

Shape suffixes: M rows in the order of their experts, E experts, O outputs, I inputs.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mt_core.parallel.tensor.weight_gradients import WeightSum, add_expert_gradients

Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]


def multiply_looped(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Each expert's rows times its weight, one expert after the other."""
    parts = x_MI.split(counts_E.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_EOI, strict=True)])


def multiply_grouped(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Each expert's rows times its weight, in one kernel, which needs no counts on the host."""
    return F.grouped_mm(x_MI, weight_EOI.transpose(1, 2), offs=counts_E.cumsum(0).to(torch.int32))


def runs_grouped(x_MD: Tensor, *weights: Tensor) -> bool:
    """Whether torch's grouped product takes these: some rows, in bf16 on a GPU since Hopper, of whole 16 bytes."""
    if x_MD.device.type != "cuda" or not len(x_MD) or torch.cuda.get_device_capability(x_MD.device) < (9, 0):
        return False
    return all(t.dtype == torch.bfloat16 and t.shape[-1] % 8 == 0 for t in (x_MD, *weights))


def multiply_summed(
    x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor, rows: Sequence[int] | None, total: WeightSum, multiply: Multiply
) -> Tensor:
    """What `multiply` returns; the weight's gradient is added to the step's sum. `rows` are the counts on the host,
    if it has them."""
    arguments = x_MI, weight_EOI.detach(), counts_E, total.anchor, total.number, rows, multiply
    return _SummedProduct.apply(*arguments)  # pyright: ignore[reportReturnType]


class _Context(Protocol):
    """What a pass forward leaves for the one back."""

    rows: Sequence[int] | None
    multiply: Multiply

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...


class _SummedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        x_MI: Tensor,
        weight_EOI: Tensor,
        counts_E: Tensor,
        anchor: Tensor,
        number: Tensor,
        rows: Sequence[int] | None,
        multiply: Multiply,
    ) -> Tensor:
        ctx.save_for_backward(x_MI, weight_EOI, counts_E, number)
        ctx.rows, ctx.multiply = rows, multiply
        return multiply(x_MI, weight_EOI, counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g_MO,), (x_MI, weight_EOI, counts_E, number) = gradients, ctx.saved_tensors
        g_MO = g_MO.contiguous()
        g_x = ctx.multiply(g_MO, weight_EOI.mT, counts_E)
        return g_x, None, None, add_expert_gradients(number, g_MO, x_MI, counts_E, ctx.rows), None, None, None
