"""Triton kernel of sums over rows; Triton is imported here, so this module is imported only where it runs."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, TILE, COLUMNS = 512, 32, 128
"""Rows and columns of one program, and the rows that it reads at once."""


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _sum_kernel(
    x, sums, rows, width, stride, count: tl.constexpr, tile: tl.constexpr, columns: tl.constexpr, wide: tl.constexpr
):
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    first = tl.program_id(1).to(tl.int64) * count
    total = tl.full((tile, columns), 0, wide)
    for step in range(0, count, tile):
        row = first + step + tl.arange(0, tile)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        total += tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(wide)
    tl.store(sums + tl.program_id(1).to(tl.int64) * width + column, tl.reduce(total, 0, _add), mask=column < width)


def sum_parts(x_MO: Tensor) -> Tensor:
    """Return the sums of each 512 rows, [P, O], in fp32, or fp64 of fp64."""
    if x_MO.stride(1) != 1:
        x_MO = x_MO.contiguous()
    rows, width = x_MO.shape
    wide: Any = tl.float64 if x_MO.dtype.itemsize == 8 else tl.float32
    parts: Any = triton.cdiv(rows, ROWS)
    sums = x_MO.new_empty(parts, width, dtype=torch.promote_types(x_MO.dtype, torch.float32))
    kernel: Any = _sum_kernel[triton.cdiv(width, COLUMNS), parts]
    if parts and width:
        kernel(x_MO, sums, rows, width, x_MO.stride(0), ROWS, TILE, COLUMNS, wide)
    return sums
