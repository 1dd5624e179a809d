"""Zig-zag sharding of a sequence: of 2·size equal pieces, rank r holds piece r and piece 2·size − 1 − r.

Under a causal mask an early token costs little and a late one much; with one piece from each end every rank has the
same work (docs/specs/core.md §4.1). The order of the pieces is known here and nowhere else.

Shape suffixes: `_of_rank` marks tensors whose first dim runs over the ranks of the axis.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from mt_core.distributed.mesh import Axis
from mt_core.errors import MtError


def check_length(length: int, size: int) -> None:
    """Refuse a sequence that cannot be cut into 2·size equal pieces; a single rank holds any length."""
    pieces = 2 * size
    if size == 1 or (length > 0 and length % pieces == 0):
        return
    lower = length - length % pieces
    nearest = f"{lower} or {lower + pieces}" if lower else f"{pieces}"
    raise MtError(
        "parallel.context",
        f"a sequence of {length} tokens cannot be cut into {pieces} equal pieces (2 for each of {size} ranks)",
        f"the nearest lengths are {nearest}",
    )


def local_positions(length: int, axis: Axis) -> Tensor:
    """Return the positions int64 [T_local] in the whole sequence of this rank's tokens, in their local order."""
    return shard_sequence(torch.arange(length), axis, dim=0)


def shard_sequence(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    """Return this rank's shard along `dim` of a tensor that every rank has whole."""
    check_length(tensor.shape[dim], axis.size)
    if axis.size == 1:
        return tensor
    pieces = tensor.chunk(2 * axis.size, dim)
    return torch.cat((pieces[axis.rank], pieces[-1 - axis.rank]), dim)


def gather_sequence(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    """Gather the whole sequence, in order, from every rank's shard; no gradient flows back."""
    if axis.size == 1:
        return tensor
    return unshard_zigzag(all_gather_stacked(tensor.detach(), axis), dim)


def all_gather_stacked(tensor: Tensor, axis: Axis) -> Tensor:
    """Gather every rank's tensor into [size, *shape], by rank."""
    every_of_rank = tensor.new_empty(axis.size, *tensor.shape)
    dist.all_gather_into_tensor(every_of_rank.flatten(0, 1), tensor.contiguous(), group=axis.group)
    return every_of_rank


def unshard_zigzag(shards_of_rank: Tensor, dim: int) -> Tensor:
    """Join the shards [size, …, T, …] of all ranks to the whole sequence […, size·T, …] along `dim` of a shard."""
    dim %= shards_of_rank.dim() - 1
    early_of_rank, late_of_rank = shards_of_rank.chunk(2, dim + 1)
    return torch.cat((*early_of_rank.unbind(), *late_of_rank.flip(0).unbind()), dim)


def shard_zigzag(whole: Tensor, size: int, dim: int) -> Tensor:
    """Split a whole sequence […, size·T, …] into the shards [size, …, T, …] of all ranks."""
    pieces = whole.chunk(2 * size, dim)
    return torch.stack([torch.cat((pieces[rank], pieces[-1 - rank]), dim) for rank in range(size)])
