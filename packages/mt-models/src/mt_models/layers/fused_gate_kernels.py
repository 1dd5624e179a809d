"""Triton kernels of silu(gate) · up; Triton is imported here, so this module is imported only where they run.

They read and write each element once, and compute in fp32 (fp64 for fp64), which is rounded once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Features that one program handles at once, at most."""


@triton.jit
def _gate_kernel(gate_up, out, width, wide: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * block + tl.arange(0, block)
    inside = feature < width
    gate = tl.load(gate_up + row * 2 * width + feature, mask=inside).to(wide)
    up = tl.load(gate_up + row * 2 * width + width + feature, mask=inside).to(wide)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * width + feature, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(g, gate_up, out, width, wide: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * block + tl.arange(0, block)
    inside = feature < width
    gradient = tl.load(g + row * width + feature, mask=inside).to(wide)
    gate = tl.load(gate_up + row * 2 * width + feature, mask=inside).to(wide)
    up = tl.load(gate_up + row * 2 * width + width + feature, mask=inside).to(wide)
    sigmoid = 1 / (1 + tl.exp(-gate))
    g_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    g_up = gradient * gate * sigmoid
    tl.store(out + row * 2 * width + feature, g_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * 2 * width + width + feature, g_up.to(out.dtype.element_ty), mask=inside)


def silu_gate(gate_up: Tensor) -> Tensor:
    """Return silu(gate) · up, [M, F], of rows [M, 2F]."""
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    if out.numel():
        grid, constants = choose_grid(out)
        _gate_kernel[grid](gate_up.contiguous(), out, *constants)
    return out


def silu_gate_backward(g: Tensor, gate_up: Tensor) -> Tensor:
    """Return the gradient of both halves, [M, 2F], given that of the result, [M, F]."""
    gradient = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    if g.numel():
        grid, constants = choose_grid(g)
        _gate_backward_kernel[grid](g, gate_up.contiguous(), gradient, *constants)
    return gradient


def choose_grid(rows_MF: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the programs of a kernel over rows, and its last arguments."""
    rows, width = rows_MF.shape
    block: Any = min(BLOCK, triton.next_power_of_2(width))
    wide = tl.float64 if rows_MF.dtype == torch.float64 else tl.float32
    return (rows, triton.cdiv(width, block)), (width, wide, block)
