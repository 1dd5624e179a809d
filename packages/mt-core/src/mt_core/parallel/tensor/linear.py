"""Linear layers cut over an axis: `torch.nn.functional.linear` with the communication that the cut needs.

With sequence parallelism x is [B, T / size, …] between the layers; without, every rank has all of it.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mt_core.distributed.mesh import Axis
from mt_core.parallel.tensor import collectives
from mt_core.parallel.tensor.linear_operators import SEQUENCE, column_linear, row_linear


@dataclass(frozen=True, slots=True)
class ColumnLinear:
    """Weight and bias are cut along the outputs: whole x in, this rank's outputs out."""

    axis: Axis
    sequence: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, T, in] to [B, T, out of this rank]."""
        if self.axis.size == 1:
            return F.linear(x, weight, bias)
        return column_linear(x, weight, bias, self.axis.group_name, self.sequence)


@dataclass(frozen=True, slots=True)
class RowLinear:
    """The weight is cut along the inputs: this rank's inputs in, the sum over ranks out; the bias is added once."""

    axis: Axis
    sequence: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, T, in of this rank] to [B, T, out]."""
        y = F.linear(x, weight) if self.axis.size == 1 else row_linear(x, weight, self.axis.group_name, self.sequence)
        return y if bias is None else y + bias


@dataclass(frozen=True, slots=True)
class VocabLinear:
    """The output layer with its rows cut over the axis: whole x in, all logits out, equal on every rank."""

    axis: Axis
    sequence: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, T, in] to [B, T, out]."""
        return collectives.gather_from_tensor_parallel(
            ColumnLinear(self.axis, self.sequence)(x, weight, bias), self.axis, -1
        )


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
        return (
            collectives.reduce_scatter(y, self.axis, SEQUENCE)
            if self.sequence
            else collectives.reduce_from_tensor_parallel(y, self.axis)
        )


@dataclass(frozen=True, slots=True)
class ColumnEmbedding:
    """`torch.nn.functional.embedding` with the columns of the table cut over the axis: no rank needs another's."""

    axis: Axis
    sequence: bool

    def __call__(self, indices: Tensor, weight: Tensor) -> Tensor:
        """[…] to […, columns of this rank]."""
        return F.embedding(indices, weight)


@dataclass(frozen=True, slots=True)
class SequenceEmbedding:
    """A whole table looked up by this rank's part of the sequence: learned positions."""

    axis: Axis
    sequence: bool

    def __call__(self, indices: Tensor, weight: Tensor) -> Tensor:
        """[…, T] to […, T / size, size of a row]."""
        return F.embedding(collectives.local_shard(indices, self.axis, -1) if self.sequence else indices, weight)
