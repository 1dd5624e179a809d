"""Sums over rows, which are gradients of biases: on a GPU a Triton kernel that reads tiles at the memory's rate.

Compiled reductions over rows reach a fraction of that, since neighbouring elements belong to different sums.
"""

from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor


class RowSumKernels(Protocol):
    """Sums over rows in kernels of their own."""

    def sum_parts(self, x_MO: Tensor) -> Tensor:
        """Return sums over parts of the rows, [P, O], in fp32 or wider."""
        ...


def sum_rows(x: Tensor) -> Tensor:
    """[…, O] to [O]: the sum over all but the last dim."""
    return _sum_rows(x) if x.is_cuda else x.flatten(0, -2).sum(0)


@torch.library.custom_op("mt::sum_rows", mutates_args=())
def _sum_rows(x: Tensor) -> Tensor:
    x_MO, kernels = x.flatten(0, -2), _import_kernels()
    return x_MO.sum(0) if kernels is None else kernels.sum_parts(x_MO).sum(0).to(x.dtype)


@_sum_rows.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[-1])


@cache
def _import_kernels() -> RowSumKernels | None:
    if find_spec("triton") is None:
        return None
    from mt_core.parallel.tensor import row_sum_kernels

    return row_sum_kernels
