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
from mt_core.parallel.context.zigzag import by_rank, gather, in_order, join_sequence


def gathered(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    segment_ids_BT: Tensor | None = None,
    *,
    axis: Axis,
    core: AttentionCore,
) -> Tensor:
    """Causal attention y_BTHK over the whole sequence, of which every rank of `axis` holds a zig-zag share.

    `core` is called with P queries and the S = e·P keys up to their end, the queries being the last positions; with
    segment ids it also gets those of the S keys, the last P of which are the queries' own.
    """
    if axis.size == 1:
        return core(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT)
    k_BLGK, v_BLGK = gather_in_order(k_BSGK, axis), gather_in_order(v_BSGK, axis)
    segment_ids_BL = None if segment_ids_BT is None else join_sequence(segment_ids_BT, axis, dim=1)
    ys_BPHK = []
    for piece, q_BPHK in zip((axis.rank, 2 * axis.size - 1 - axis.rank), q_BTHK.chunk(2, 1), strict=True):
        end = (piece + 1) * q_BPHK.shape[1]
        segment_ids = None if segment_ids_BL is None else segment_ids_BL[:, :end]
        ys_BPHK.append(core(q_BPHK, k_BLGK[:, :end], v_BLGK[:, :end], segment_ids))
    return torch.cat(ys_BPHK, 1)


def gather_in_order(share_BT___: Tensor, axis: Axis) -> Tensor:
    """The whole sequence [B, L, …] on every rank, from zig-zag shares [B, T, …]; the gradient is summed over ranks."""
    return _GatherInOrder.apply(share_BT___, axis)


class _GatherInOrder(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, share_BT___: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return in_order(gather(share_BT___, axis), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (whole,) = grads
        wide = torch.promote_types(whole.dtype, torch.float32)
        wide_of_rank = by_rank(whole, ctx.axis.size, dim=1).to(wide).contiguous()  # a transposed gradient stays so
        share = torch.empty_like(wide_of_rank[0])
        dist.reduce_scatter_tensor(share, wide_of_rank.flatten(0, 1), group=ctx.axis.group)
        return share.to(whole.dtype), None
