"""Linear layers that add the gradient of their weight to the step's sum themselves (`weight_gradients` says why)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mt_core.parallel.tensor.linear import ColumnLinear, RowLinear
from mt_core.parallel.tensor.linear_operators import (
    column_linear,
    column_linear_backward,
    row_linear,
    row_linear_backward,
)
from mt_core.parallel.tensor.row_sums import sum_rows
from mt_core.parallel.tensor.weight_gradients import WeightSum, add_weight_gradient

LinearOp = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class SummedLinear:
    """A linear layer's `op` that adds the gradient of its weight to the step's sum itself."""

    op: LinearOp
    """`torch.nn.functional.linear`, a `ColumnLinear` or a `RowLinear`."""
    total: WeightSum

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What `op` returns."""
        cut, group, sequence = "", "", False
        if isinstance(self.op, ColumnLinear | RowLinear) and self.op.axis.size > 1:
            cut = "column" if isinstance(self.op, ColumnLinear) else "row"
            group, sequence = self.op.axis.group_name, self.op.sequence
        total = self.total
        arguments = x, weight.detach(), bias, total.anchor, total.number, cut, group, sequence
        return _SummedLinear.apply(*arguments)  # pyright: ignore[reportReturnType]


class _Context(Protocol):
    """What a pass forward leaves for the one back."""

    cut: str
    group: str
    sequence: bool

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...


class _SummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        number: Tensor,
        cut: str,
        group: str,
        sequence: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, number)
        ctx.cut, ctx.group, ctx.sequence = cut, group, sequence
        if cut == "column":
            return column_linear(x, weight, bias, group, sequence)
        if cut == "row":
            y = row_linear(x, weight, group, sequence)
            return y if bias is None else y + bias
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,), (x, weight, number) = gradients, ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad[:3]
        if ctx.cut:
            backward = column_linear_backward if ctx.cut == "column" else row_linear_backward
            g_x, g_anchor = backward(g, x, weight if needs_x else None, ctx.group, ctx.sequence, number)
        else:
            g_x, g_anchor = g @ weight if needs_x else None, add_weight_gradient(number, g, x)
        g_bias = sum_rows(g) if needs_bias else None
        return g_x if needs_x else None, None, g_bias, g_anchor, None, None, None, None
