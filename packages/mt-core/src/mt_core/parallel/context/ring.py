"""Ring attention: keys and values go around the ring of ranks while each rank attends to the block it holds.

After `size` steps every query has met every key it may see; the parts are merged by their log-sum-exps in fp32 or wider
(Liu et al. 2023, arXiv 2310.01889). Zig-zag shards make all steps equal work: the local block costs a causal half of
T², and of every other block half is visible: its early keys to all queries, or all keys to the late queries. The next
block travels while the present one is computed. Backward sends the blocks around again, and with each block its
gradient, which every rank adds to before passing it on. Saved for backward: the local q, k, v, y and lse, never a
travelling block.

Shape suffixes: B batch, T queries, S keys, H = G·R query heads, G key/value groups, K head size.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mt_core.distributed.mesh import Axis
from mt_core.parallel.context.attention_chunks import Chunk, attend, attend_backward
from mt_core.parallel.context.zigzag import all_gather_stacked, local_positions
from mt_core.parallel.dropout import ProbabilityDropout


@dataclass(frozen=True, slots=True)
class PendingRecv:
    """Tensors being received, and those being sent, which must stay alive until the exchange is over."""

    tensors: tuple[Tensor, ...]
    works: tuple[dist.Work, ...] = ()
    sent: tuple[Tensor, ...] = ()

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for the tensors to arrive, and return them."""
        for work in self.works:
            work.wait()
        return self.tensors


def send_recv_next(tensors: tuple[Tensor, ...], axis: Axis) -> PendingRecv:
    """Begin to send tensors to the next rank and to receive the previous one's; do not write to them meanwhile."""
    if axis.size == 1:
        return PendingRecv(tensors)
    received = tuple(torch.empty_like(x) for x in tensors)
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    sends = [dist.P2POp(dist.isend, x, group=axis.group, group_peer=after) for x in tensors]
    receives = [dist.P2POp(dist.irecv, x, group=axis.group, group_peer=before) for x in received]
    return PendingRecv(received, tuple(dist.batch_isend_irecv([*sends, *receives])), sent=tensors)


def ring_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    segment_ids_BT: Tensor | None = None,
    *,
    axis: Axis,
    dropout: ProbabilityDropout | None = None,
) -> Tensor:
    """Compute causal attention y_BTHK over the whole sequence, of which every rank of `axis` holds a zig-zag shard.

    `segment_ids_BT`: a number per local token; tokens of different segments do not see each other.
    """
    segment_ids = None if segment_ids_BT is None else _gather_segment_ids(segment_ids_BT, axis)
    masks = Masks(segment_ids, None if dropout is None else _split_dropout(dropout, q_BTHK, axis))
    qkv = (x.contiguous() for x in (q_BTHK, k_BSGK, v_BSGK))  # messages are, and kernels want it
    return _Ring.apply(*qkv, masks, axis)


def _gather_segment_ids(segment_ids_BT: Tensor, axis: Axis) -> tuple[Tensor, ...]:
    return (segment_ids_BT,) if axis.size == 1 else all_gather_stacked(segment_ids_BT, axis).unbind()


def _split_dropout(dropout: ProbabilityDropout, q_BTHK: Tensor, axis: Axis) -> tuple[ProbabilityDropout, ...]:
    """What this rank's queries drop of each rank's keys."""
    length = q_BTHK.shape[1] * axis.size
    positions = [
        local_positions(length, replace(axis, rank=rank)).to(q_BTHK.device, torch.int32) for rank in range(axis.size)
    ]
    return tuple(dropout._replace(queries_T=positions[axis.rank], keys_S=keys_S) for keys_S in positions)


@dataclass(frozen=True, slots=True)
class Masks:
    """What masks the probabilities beside causality, by the rank that holds the keys; None where nothing does."""

    segment_ids: tuple[Tensor, ...] | None
    dropout: tuple[ProbabilityDropout, ...] | None


@dataclass(frozen=True, slots=True)
class VisiblePart:
    """What this rank's queries see of a block: which local queries, which of the block's keys, and whether causally."""

    queries: slice
    keys: slice
    causal: bool


def get_visible_part(rank: int, source: int, length: int) -> VisiblePart:
    """Return the part of the `length` tokens on rank `source` that `rank` sees, with zig-zag shards."""
    everything, early, late = slice(0, length), slice(0, length // 2), slice(length // 2, length)
    if source == rank:
        return VisiblePart(everything, everything, causal=True)
    return (
        VisiblePart(everything, early, causal=False) if source < rank else VisiblePart(late, everything, causal=False)
    )


class _Ring(torch.autograd.Function):
    """The ring as one differentiable operation."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGK: Tensor,
        masks: Masks,
        axis: Axis,
    ) -> Tensor:
        y_BTHK, lse_BHT = _forward_ring(_steps((q_BTHK, k_BSGK, v_BSGK), masks, axis))
        y_BTHK = y_BTHK.to(q_BTHK.dtype)
        ctx.axis, ctx.masks = axis, masks
        ctx.save_for_backward(q_BTHK, k_BSGK, v_BSGK, y_BTHK, lse_BHT)
        return y_BTHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *qkv, y_BTHK, lse_BHT = ctx.saved_tensors
        steps = _steps(qkv, ctx.masks, ctx.axis)
        dqkv = _backward_ring(steps, merged=(grads[0].contiguous(), y_BTHK, lse_BHT), axis=ctx.axis)
        return *(dx.to(x.dtype) for dx, x in zip(dqkv, qkv, strict=True)), None, None


def _forward_ring(steps: Iterable[tuple[VisiblePart, Chunk]]) -> tuple[Tensor, Tensor]:
    """Walk forward around the ring: merged y_BTHK and lse_BHT, both in fp32 or wider."""
    y_BTHK = lse_BHT = torch.empty(0)
    for number, (part, chunk) in enumerate(steps):
        y_part, lse_part = attend(chunk)
        if number == 0:  # the local block: all queries
            y_BTHK, lse_BHT = y_part.to(lse_part.dtype), lse_part
        else:
            _merge(y_BTHK[:, part.queries], lse_BHT[:, :, part.queries], y_part, lse_part)
    return y_BTHK, lse_BHT


def _backward_ring(
    steps: Iterable[tuple[VisiblePart, Chunk]], *, merged: tuple[Tensor, Tensor, Tensor], axis: Axis
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk backward around the ring with the merged dy, y and lse: dq_BTHK, dk_BSGK and dv_BSGK, in fp32 or wider."""
    dy_BTHK, y_BTHK, lse_BHT = merged
    dq_BTHK, pending = torch.empty(0), PendingRecv(())
    for number, (part, chunk) in enumerate(steps):
        y_part, lse_part = y_BTHK[:, part.queries], lse_BHT[:, :, part.queries]
        parts = attend_backward(chunk, dy_BTHK[:, part.queries], y_BTHK=y_part, lse_BHT=lse_part)
        if number == 0:  # the local block: all queries and keys
            dq_BTHK, dk_BSGK, dv_BSGK = (x.contiguous().to(lse_BHT.dtype) for x in parts)
        else:
            dq_BTHK[:, part.queries] += parts[0]
            dk_BSGK, dv_BSGK = pending.wait()  # the gradient so far, from the ranks that had the block before
            dk_BSGK[:, part.keys] += parts[1]
            dv_BSGK[:, part.keys] += parts[2]
        pending = send_recv_next((dk_BSGK, dv_BSGK), axis)  # overlaps the next step; after the last it is home
    dk_BSGK, dv_BSGK = pending.wait()
    return dq_BTHK, dk_BSGK, dv_BSGK


def _steps(qkv: Sequence[Tensor], masks: Masks, axis: Axis) -> Iterator[tuple[VisiblePart, Chunk]]:
    """Yield the local block, then those of the ranks before; each is received while the caller works on the last."""
    q_BTHK, *kv = qkv
    for step in range(axis.size):
        pending = send_recv_next(tuple(kv), axis) if step + 1 < axis.size else PendingRecv(tuple(kv))
        source = (axis.rank - step) % axis.size
        part = get_visible_part(axis.rank, source, q_BTHK.shape[1])
        k_BSGK, v_BSGK = (x[:, part.keys] for x in kv)
        same_BTS = _mask_segments(masks.segment_ids, axis.rank, source, part)
        dropout = _cut_dropout(masks.dropout, source, part)
        yield part, Chunk(q_BTHK[:, part.queries], k_BSGK, v_BSGK, part.causal, same_BTS, dropout)
        kv = pending.wait()


def _mask_segments(segment_ids: tuple[Tensor, ...] | None, rank: int, source: int, part: VisiblePart) -> Tensor | None:
    """Return boolean same_BTS: which of the block's keys are in the document of the query."""
    if segment_ids is None:
        return None
    return segment_ids[rank][:, part.queries, None] == segment_ids[source][:, None, part.keys]


def _cut_dropout(
    dropout: tuple[ProbabilityDropout, ...] | None, source: int, part: VisiblePart
) -> ProbabilityDropout | None:
    """What the part's queries drop of its keys, which rank `source` holds."""
    if dropout is None:
        return None
    whole = dropout[source]
    return whole._replace(queries_T=whole.queries_T[part.queries], keys_S=whole.keys_S[part.keys])


def _merge(y_BTHK: Tensor, lse_BHT: Tensor, y_part: Tensor, lse_part: Tensor) -> None:
    """Merge a part into y and lse, in place. The local block came first, so lse is finite: a token sees itself."""
    weight_BTH1 = torch.sigmoid(lse_part - lse_BHT).transpose(1, 2)[..., None]
    y_BTHK.lerp_(y_part.to(y_BTHK.dtype), weight_BTH1)
    lse_BHT.copy_(torch.logaddexp(lse_BHT, lse_part))
