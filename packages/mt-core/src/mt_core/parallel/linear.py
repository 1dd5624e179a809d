"""Linear layers cut over an axis: `torch.nn.functional.linear` with the communication that the cut needs.

With sequence parallelism x is [B, T / size, …] between the layers; without, every rank has all of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mt_core.parallel import collectives
from mt_core.parallel.axis import Axis

SEQUENCE = 1
"""The dim of activations that sequence parallelism cuts."""


@dataclass(frozen=True, slots=True)
class ColumnLinear:
    """Weight and bias are cut along the outputs: whole x in, this rank's outputs out."""

    axis: Axis
    sequence: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, T, in] to [B, T, out of this rank]."""
        return _ColumnLinear.apply(x, weight, bias, self.axis, self.sequence)  # pyright: ignore[reportReturnType]


class _ColumnLinear(torch.autograd.Function):
    """The backward pass overlaps communication with the product for the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, sequence: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axis, ctx.sequence, ctx.biased = axis, sequence, bias is not None
        whole = collectives.start_joined(x, axis, SEQUENCE)() if sequence else x
        return F.linear(whole, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, weight = ctx.saved_tensors
        gathering = collectives.start_joined(x, ctx.axis, SEQUENCE) if ctx.sequence else lambda: x
        g_x = g @ weight
        if ctx.sequence:
            reducing = collectives.start_summed_part(g_x, ctx.axis, SEQUENCE)
        else:
            reducing = collectives.start_summed(g_x, ctx.axis)
        flat = g.flatten(0, -2)
        g_weight = flat.mT @ gathering().flatten(0, -2) if ctx.needs_input_grad[1] else None
        g_bias = flat.sum(0) if ctx.biased else None
        return reducing(), g_weight, g_bias, None, None


@dataclass(frozen=True, slots=True)
class RowLinear:
    """The weight is cut along the inputs: this rank's inputs in, the sum over ranks out; the bias is added once."""

    axis: Axis
    sequence: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, T, in of this rank] to [B, T, out]."""
        y = F.linear(x, weight)
        y = collectives.reduce_scatter(y, self.axis, SEQUENCE) if self.sequence else collectives.reduce(y, self.axis)
        return y if bias is None else y + bias


@dataclass(frozen=True, slots=True)
class VocabLinear:
    """The output layer with its rows cut over the axis: whole x in, all logits out, equal on every rank."""

    axis: Axis
    sequence: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, T, in] to [B, T, out]."""
        return collectives.join(ColumnLinear(self.axis, self.sequence)(x, weight, bias), self.axis, -1)


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
        return collectives.reduce_scatter(y, self.axis, SEQUENCE) if self.sequence else collectives.reduce(y, self.axis)


@dataclass(frozen=True, slots=True)
class SequenceEmbedding:
    """A whole table looked up by this rank's part of the sequence: learned positions."""

    axis: Axis
    sequence: bool

    def __call__(self, indices: Tensor, weight: Tensor) -> Tensor:
        """[…, T] to […, T / size, size of a row]."""
        return F.embedding(collectives.own(indices, self.axis, -1) if self.sequence else indices, weight)
