"""The gate of a feed-forward layer, activation(gate) · up, where both are halves of one product.

For silu on a GPU it is one Triton kernel each way, whose rows may be any number without being compiled again.

Shape suffixes: M rows, F hidden features.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class GateKernels(Protocol):
    """The gate of rows [M, 2F] in kernels of its own."""

    def silu_gate(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) · up, [M, F]."""
        ...

    def silu_gate_backward(self, g: Tensor, gate_up: Tensor) -> Tensor:
        """Return the gradient of both halves, [M, 2F], given that of the result."""
        ...


def gate(gate_up_M2F: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """[M, 2F] to [M, F]."""
    kernels = import_kernels() if gate_up_M2F.is_cuda and not torch.compiler.is_compiling() else None
    if activation is F.silu and kernels is not None:
        return FusedGate.apply(gate_up_M2F, kernels)  # pyright: ignore[reportReturnType]
    gate_MF, up_MF = gate_up_M2F.chunk(2, -1)
    return activation(gate_MF) * up_MF


@cache
def import_kernels() -> GateKernels | None:
    """The kernels in Triton, or None where that is not installed."""
    if find_spec("triton") is None:
        return None
    from mt_models.layers import fused_gate_kernels

    return fused_gate_kernels


class _Context(Protocol):
    kernels: GateKernels

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...


class FusedGate(torch.autograd.Function):
    """silu(gate) · up with these kernels."""

    @staticmethod
    def forward(ctx: _Context, gate_up: Tensor, kernels: GateKernels) -> Tensor:
        """[M, 2F] to [M, F]."""
        ctx.save_for_backward(gate_up)
        ctx.kernels = kernels
        return kernels.silu_gate(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[M, F] to [M, 2F]."""
        return ctx.kernels.silu_gate_backward(gradients[0].contiguous(), *ctx.saved_tensors), None
