"""Triton kernels of permutations: the plain functions of `mt_core.parallel.expert.permutation`, each in one kernel.

They read and write each row once, and sum up in fp32 (fp64 for fp64) without rounding products. Triton is imported
here, so this module is imported only where its kernels run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Features that one program handles at once, at most."""


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _gather_kernel(
    x,
    order,
    weights,
    out,
    choices: tl.constexpr,
    width: tl.constexpr,
    weighted: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * block + tl.arange(0, block)
    choice = tl.load(order + row)
    values = tl.load(x + choice // choices * width + feature, mask=feature < width)
    if weighted:
        values = values.to(wide) * tl.load(weights + choice).to(wide)
    tl.store(out + row * width + feature, values.to(out.dtype.element_ty), mask=feature < width)


@triton.jit
def _add_kernel(
    y,
    back,
    weights,
    out,
    rows,
    choices: tl.constexpr,
    width: tl.constexpr,
    weighted: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.full((block,), 0, wide)
    for choice in range(choices):
        row = tl.load(back + token * choices + choice)
        values = tl.load(y + row * width + feature, mask=(feature < width) & (row < rows), other=0.0).to(wide)
        if weighted:
            values = values * tl.load(weights + token * choices + choice).to(wide)
        total += values
    tl.store(out + token * width + feature, total.to(out.dtype.element_ty), mask=feature < width)


@triton.jit
def _multiply_kernel(
    y, back, g, out, rows, choices: tl.constexpr, width: tl.constexpr, wide: tl.constexpr, block: tl.constexpr
):
    choice = tl.program_id(0).to(tl.int64)
    row = tl.load(back + choice)
    token = choice // choices
    total = tl.full((block,), 0, wide)
    for start in range(0, width, block):
        feature = start + tl.arange(0, block)
        values = tl.load(y + row * width + feature, mask=(feature < width) & (row < rows), other=0.0).to(wide)
        total += values * tl.load(g + token * width + feature, mask=feature < width, other=0.0).to(wide)
    tl.store(out + choice, tl.reduce(total, 0, _add))


def gather_tokens(x_ND: Tensor, order_R: Tensor, choices: int, weights_NC: Tensor | None = None) -> Tensor:
    """Return the features of the token of each choice in `order`, of all M = `choices`, times the choice's weight."""
    x_ND, (rows, width) = x_ND.contiguous(), (len(order_R), x_ND.shape[1])
    out_RD = x_ND.new_empty(rows, width)
    if rows:
        weights = x_ND if weights_NC is None else weights_NC.contiguous()
        each, block = choices // len(x_ND), get_block(width)
        launch: Any = _gather_kernel[rows, triton.cdiv(width, block)]
        launch(x_ND, order_R, weights, out_RD, each, width, weights_NC is not None, get_wide(x_ND), block)
    return out_RD


def add_choices(y_RD: Tensor, back_M: Tensor, tokens: int, weights_NC: Tensor | None = None) -> Tensor:
    """Return the sum over each token's choices of their rows, times their weights."""
    y_RD, (rows, width) = y_RD.contiguous(), y_RD.shape
    out_ND = y_RD.new_empty(tokens, width)
    if tokens:
        weights = back_M if weights_NC is None else weights_NC.contiguous()
        each, block = len(back_M) // tokens, get_block(width)
        launch: Any = _add_kernel[tokens, triton.cdiv(width, block)]
        launch(y_RD, back_M, weights, out_ND, rows, each, width, weights_NC is not None, get_wide(y_RD), block)
    return out_ND


def multiply_choices(y_RD: Tensor, back_M: Tensor, g_ND: Tensor) -> Tensor:
    """Return the inner product of the row of each choice and `g` of its token, [M], summed up in fp32 or wider."""
    y_RD, g_ND = y_RD.contiguous(), g_ND.contiguous()
    out_M = y_RD.new_empty(len(back_M), dtype=torch.promote_types(y_RD.dtype, torch.float32))
    if len(back_M):
        each, width = len(back_M) // len(g_ND), y_RD.shape[1]
        launch: Any = _multiply_kernel[(len(back_M),)]
        launch(y_RD, back_M, g_ND, out_M, len(y_RD), each, width, get_wide(y_RD), get_block(width))
    return out_M


def get_block(width: int) -> int:
    """Return how many features a program handles at once."""
    return min(1 << (width - 1).bit_length(), BLOCK)


def get_wide(x: Tensor) -> tl.dtype:
    """Return the type that sums of a tensor's elements are computed in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32
