"""Orders of rows: sorting tokens by expert and back, with gradients that are gathered instead of added up.

Shape suffixes: D model size, e experts of this rank, n ranks, R rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sort_by_expert(counts_ne: Tensor, rows: int) -> Tensor:
    """From rows by rank, and within a rank by expert, to rows by expert: where each of them is now."""
    experts = torch.arange(counts_ne.shape[1], device=counts_ne.device).repeat(counts_ne.shape[0])
    return experts.repeat_interleave(counts_ne.flatten(), output_size=rows).argsort(stable=True)


def invert_permutation(order_R: Tensor) -> Tensor:
    """The order that undoes another."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


def permute(x_RD: Tensor, order_R: Tensor, back_R: Tensor) -> Tensor:
    """x[order]; `back` is the inverse order, in which the gradient is gathered instead of added up."""
    return _Permute.apply(x_RD, order_R, back_R)  # pyright: ignore[reportReturnType]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, order_R: Tensor, back_R: Tensor) -> Tensor:
        ctx.save_for_backward(back_R)
        return x_RD[order_R]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (back_R,) = ctx.saved_tensors
        return gradients[0][back_R], None, None
