"""What a router needs of the other ranks that share its sequences: context ranks, and tensor ranks that divide them.

A loss of a whole sequence is a sum of parts, one on each of these ranks, since each has some of the tokens. What
multiplies a part is summed over the ranks first: forward the counts of choices, backward the weight of the sequence in
the loss of the step.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mt_core.distributed.mesh import Axis, Mesh
from mt_core.parallel.context.zigzag import all_gather_stacked, gather_sequence, shard_sequence
from mt_core.parallel.tensor.collectives import local_shard


def keep(tensor: Tensor) -> Tensor:
    """Return what one rank alone already has of whole sequences."""
    return tensor


class SequenceShards(NamedTuple):
    """How to complete what this rank knows of its sequences."""

    ranks: int = 1
    """Ranks that share each sequence."""
    sum: Callable[[Tensor], Tensor] = keep
    """Sum a tensor over those ranks; no gradient flows back."""
    sum_step: Callable[[Tensor], Tensor] = keep
    """Sum a tensor over all ranks that have tokens of the step; no gradient flows back."""
    gather: Callable[[Tensor], Tensor] = keep
    """Gather [B, T, …] of this rank to that of whole sequences, in order; no gradient flows back."""
    take_local: Callable[[Tensor], Tensor] = keep
    """Return this rank's part of [B, T, …] of whole sequences."""
    take_tensor_part: Callable[[Tensor], Tensor] = keep
    """Return this tensor rank's part of the [B, T, …] that its context rank has."""
    sum_gradient: Callable[[Tensor], Tensor] = keep
    """Return the tensor; its gradient is summed over the ranks that have different labels of a sequence."""


WHOLE_SEQUENCES = SequenceShards()
"""The shards of a rank that has every sequence whole."""


def make_sequence_shards(mesh: Mesh, *, sequence: bool) -> SequenceShards:
    """Return the shards of a layout; under sequence parallelism tensor ranks divide sequences further.

    The loss of a label is on every tensor rank, but on one context rank only.
    """
    tensor = mesh.tensor if sequence else Axis("tensor")
    axes = tuple(axis for axis in (mesh.context, tensor) if axis.size > 1)
    step = (*axes, mesh.data) if mesh.data.size > 1 else axes
    shards = WHOLE_SEQUENCES._replace(sum_step=_make_sum(step) if step else keep)
    if not axes:
        return shards
    return shards._replace(
        ranks=mesh.context.size * tensor.size,
        sum=_make_sum(axes),
        gather=partial(_gather, mesh.context, tensor),
        take_local=partial(_take, mesh.context, tensor),
        take_tensor_part=partial(local_shard, axis=tensor, dim=1) if tensor.size > 1 else keep,
        sum_gradient=_make_gradient_sum(mesh.context) if mesh.context.size > 1 else keep,
    )


def _gather(context: Axis, tensor: Axis, x: Tensor) -> Tensor:
    if tensor.size > 1:
        x = torch.cat(all_gather_stacked(x.detach(), tensor).unbind(), 1)
    return gather_sequence(x, context, 1)


def _take(context: Axis, tensor: Axis, x: Tensor) -> Tensor:
    return local_shard(shard_sequence(x, context, 1), tensor, 1)


def _make_sum(axes: tuple[Axis, ...]) -> Callable[[Tensor], Tensor]:
    def add_up(tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        for axis in axes:
            axis.sum_(total)
        return total

    return add_up


def _make_gradient_sum(axis: Axis) -> Callable[[Tensor], Tensor]:
    def sum_gradient(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        tensor = tensor.view_as(tensor)
        tensor.register_hook(lambda gradient: axis.sum_(gradient.contiguous().clone()))
        return tensor

    return sum_gradient
