"""All-to-all attention: ranks trade sequence for heads, attend to the whole sequence with fewer heads, and trade back.

Jacobs et al. 2023 (DeepSpeed Ulysses, arXiv 2309.14509). Each rank holds every position of H/size query heads and
G/size groups while it attends, so the unchanged attention core runs once, as if there were no context parallelism. An
exchange moves 1/size of what an all-gather would, but heads and groups must be divisible by the size of the axis.

Shape suffixes: B batch, T this rank's queries, S its keys, L the whole sequence, H query heads, G key/value groups,
N any of the two, h g n = H G N / size, K head size.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mt_core.contracts import AttentionCore
from mt_core.distributed.mesh import Axis
from mt_core.errors import MtError
from mt_core.parallel.context.zigzag import gather_sequence, shard_zigzag, unshard_zigzag
from mt_core.parallel.dropout import ProbabilityDropout, number_positions, pass_dropout


def ulysses_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    segment_ids_BT: Tensor | None = None,
    *,
    axis: Axis,
    core: AttentionCore,
    dropout: ProbabilityDropout | None = None,
) -> Tensor:
    """Compute causal attention y_BTHK over the whole sequence, of which every rank of `axis` holds a zig-zag shard.

    `core` is called once, with all positions in order. Raises MtError if the axis does not divide heads and groups.
    """
    check_heads(q_BTHK.shape[2], k_BSGK.shape[2], axis.size)
    if axis.size == 1:
        return core(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, **pass_dropout(dropout))
    q_BLhK, k_BLgK, v_BLgK = (sequence_to_heads(x, axis) for x in (q_BTHK, k_BSGK, v_BSGK))
    segment_ids_BL = None if segment_ids_BT is None else gather_sequence(segment_ids_BT, axis, dim=1)
    if dropout is not None:
        positions_L = number_positions(0, q_BLhK.shape[1], q_BLhK.device)
        heads_h = dropout.heads_H.chunk(axis.size)[axis.rank]
        dropout = dropout._replace(heads_H=heads_h, queries_T=positions_L, keys_S=positions_L)
    return heads_to_sequence(core(q_BLhK, k_BLgK, v_BLgK, segment_ids_BL, **pass_dropout(dropout)), axis)


def check_heads(query_heads: int, groups: int, size: int) -> None:
    """Refuse an axis that cannot give each rank the same number of query heads and of groups."""
    if query_heads % size == 0 and groups % size == 0:
        return
    common = math.gcd(query_heads, groups)
    sizes = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    raise MtError(
        "parallel.context",
        f"all_to_all cannot share {query_heads} heads in {groups} key/value groups among {size} ranks",
        f'allowed sizes: {sizes}; cp_comm_type "ring" and "all_gather" take any',
    )


def sequence_to_heads(shard_BTNK: Tensor, axis: Axis) -> Tensor:
    """Exchange a zig-zag shard of all heads for all positions, in order, of this rank's heads: [B, L, n, K]."""
    return unshard_zigzag(_Swap.apply(torch.stack(shard_BTNK.chunk(axis.size, 2)), axis), dim=1)


def heads_to_sequence(whole_BLnK: Tensor, axis: Axis) -> Tensor:
    """Exchange all positions of this rank's heads for a zig-zag shard of all heads: [B, T, N, K]."""
    return torch.cat(_Swap.apply(shard_zigzag(whole_BLnK, axis.size, dim=1), axis).unbind(), 2)


class _Swap(torch.autograd.Function):
    """Entry i of a [size, …] tensor goes to rank i, and entry i of the result came from it; its own adjoint."""

    @staticmethod
    def forward(ctx: Any, parts_of_rank: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _swap(parts_of_rank, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _swap(grads[0], ctx.axis), None


def _swap(parts_of_rank: Tensor, axis: Axis) -> Tensor:
    swapped_of_rank = torch.empty_like(parts_of_rank, memory_format=torch.contiguous_format)
    dist.all_to_all_single(swapped_of_rank, parts_of_rank.contiguous(), group=axis.group)
    return swapped_of_rank
