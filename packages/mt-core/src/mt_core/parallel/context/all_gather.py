"""All-gather attention: every rank holds all keys and values for a moment, and its queries attend to them.

The gather overlaps with nothing and the whole sequence's keys and values are kept for backward (2·L·G·K elements a
layer), but each rank runs the unchanged attention core: once for each of its two pieces, with the keys up to the end of
that piece. Backward reduce-scatters dk and dv, added up in fp32 or wider.

Shape suffixes: B batch, T this rank's queries, S its keys, H query heads, G key/value groups, K head size;
L the whole sequence, P = L / (2·size) a piece.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mt_core.contracts import AttentionCore
from mt_core.distributed.mesh import Axis
from mt_core.parallel.context.zigzag import all_gather_stacked, gather_sequence, shard_zigzag, unshard_zigzag
from mt_core.parallel.dropout import ProbabilityDropout, number_positions, pass_dropout


def all_gather_attention(
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

    `core` is called with P queries and the S = e·P keys up to their end, the queries being the last positions; with
    segment ids it also gets those of the S keys, the last P of which are the queries' own.
    """
    if axis.size == 1:
        return core(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, **pass_dropout(dropout))
    k_BLGK, v_BLGK = gather_unsharded(k_BSGK, axis), gather_unsharded(v_BSGK, axis)
    segment_ids_BL = None if segment_ids_BT is None else gather_sequence(segment_ids_BT, axis, dim=1)
    ys_BPHK = []
    for piece, q_BPHK in zip((axis.rank, 2 * axis.size - 1 - axis.rank), q_BTHK.chunk(2, 1), strict=True):
        end = (piece + 1) * q_BPHK.shape[1]
        segment_ids = None if segment_ids_BL is None else segment_ids_BL[:, :end]
        positions = number_positions(0, end, q_BTHK.device)
        more = pass_dropout(dropout, queries_T=positions[-q_BPHK.shape[1] :], keys_S=positions)
        ys_BPHK.append(core(q_BPHK, k_BLGK[:, :end], v_BLGK[:, :end], segment_ids, **more))
    return torch.cat(ys_BPHK, 1)


def gather_unsharded(shard_BT___: Tensor, axis: Axis) -> Tensor:
    """Gather the whole sequence [B, L, …] from zig-zag shards [B, T, …]; its gradient is summed over ranks."""
    return _GatherUnsharded.apply(shard_BT___, axis)


class _GatherUnsharded(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, shard_BT___: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return unshard_zigzag(all_gather_stacked(shard_BT___, axis), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (whole,) = grads
        wide = torch.promote_types(whole.dtype, torch.float32)
        wide_of_rank = shard_zigzag(whole, ctx.axis.size, dim=1).to(wide).contiguous()  # a transposed gradient stays so
        shard = torch.empty_like(wide_of_rank[0])
        dist.reduce_scatter_tensor(shard, wide_of_rank.flatten(0, 1), group=ctx.axis.group)
        return shard.to(whole.dtype), None
