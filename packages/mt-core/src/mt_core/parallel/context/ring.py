"""Ring attention: keys and values go around the ring of ranks while each rank attends to the block it holds.

After `size` steps every query has met every key it may see; the parts are merged by their log-sum-exps in fp32 or wider
(Liu et al. 2023, arXiv 2310.01889). Zig-zag shares make all steps equal work: the own block costs a causal half of T²,
and of every other block half is visible: its early keys to all queries, or all keys to the late queries. The next block
travels while the present one is computed. Backward sends the blocks around again, and with each block its gradient,
which every rank adds to before passing it on. Saved for backward: the own q, k, v, y and lse, never a travelling block.

Shape suffixes: B batch, T queries, S keys, H = G·R query heads, G key/value groups, K head size.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mt_core.distributed.mesh import Axis
from mt_core.parallel.context.attention_chunks import Chunk, attend, attend_backward
from mt_core.parallel.context.zigzag import gather


@dataclass(frozen=True, slots=True)
class Coming:
    """Tensors on their way to this rank, and those that leave it, which must live until the exchange is over."""

    tensors: tuple[Tensor, ...]
    works: tuple[dist.Work, ...] = ()
    leaving: tuple[Tensor, ...] = ()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, once they are here."""
        for work in self.works:
            work.wait()
        return self.tensors


def pass_on(tensors: tuple[Tensor, ...], axis: Axis) -> Coming:
    """Start to send tensors to the next rank and to receive those of the one before; do not write to them meanwhile."""
    if axis.size == 1:
        return Coming(tensors)
    arriving = tuple(torch.empty_like(x) for x in tensors)
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    sends = [dist.P2POp(dist.isend, x, group=axis.group, group_peer=after) for x in tensors]
    receives = [dist.P2POp(dist.irecv, x, group=axis.group, group_peer=before) for x in arriving]
    return Coming(arriving, tuple(dist.batch_isend_irecv([*sends, *receives])), leaving=tensors)


def ring(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, segment_ids_BT: Tensor | None = None, *, axis: Axis) -> Tensor:
    """Causal attention y_BTHK over the whole sequence, of which every rank of `axis` holds a zig-zag share.

    `segment_ids_BT`: a number per local token; tokens of different segments do not see each other.
    """
    segment_ids = None if segment_ids_BT is None else _gather_segment_ids(segment_ids_BT, axis)
    qkv = (x.contiguous() for x in (q_BTHK, k_BSGK, v_BSGK))  # messages are, and kernels want it
    return _Ring.apply(*qkv, segment_ids, axis)


def _gather_segment_ids(segment_ids_BT: Tensor, axis: Axis) -> tuple[Tensor, ...]:
    return (segment_ids_BT,) if axis.size == 1 else gather(segment_ids_BT, axis).unbind()


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank's queries see of a block: which local queries, which of the block's keys, and whether causally."""

    queries: slice
    keys: slice
    causal: bool


def visible_part(rank: int, source: int, length: int) -> Part:
    """The part of the `length` tokens that `source` holds which `rank` sees, with zig-zag shares."""
    everything, early, late = slice(0, length), slice(0, length // 2), slice(length // 2, length)
    if source == rank:
        return Part(everything, everything, causal=True)
    return Part(everything, early, causal=False) if source < rank else Part(late, everything, causal=False)


class _Ring(torch.autograd.Function):
    """The ring as one differentiable operation."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGK: Tensor,
        segment_ids: tuple[Tensor, ...] | None,
        axis: Axis,
    ) -> Tensor:
        y_BTHK, lse_BHT = _around(_steps((q_BTHK, k_BSGK, v_BSGK), segment_ids, axis))
        y_BTHK = y_BTHK.to(q_BTHK.dtype)
        ctx.axis, ctx.segment_ids = axis, segment_ids
        ctx.save_for_backward(q_BTHK, k_BSGK, v_BSGK, y_BTHK, lse_BHT)
        return y_BTHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *qkv, y_BTHK, lse_BHT = ctx.saved_tensors
        steps = _steps(qkv, ctx.segment_ids, ctx.axis)
        dqkv = _around_again(steps, merged=(grads[0].contiguous(), y_BTHK, lse_BHT), axis=ctx.axis)
        return *(dx.to(x.dtype) for dx, x in zip(dqkv, qkv, strict=True)), None, None


def _around(steps: Iterable[tuple[Part, Chunk]]) -> tuple[Tensor, Tensor]:
    """The forward walk: merged y_BTHK and lse_BHT, both in fp32 or wider."""
    y_BTHK = lse_BHT = torch.empty(0)
    for number, (part, chunk) in enumerate(steps):
        y_part, lse_part = attend(chunk)
        if number == 0:  # the own block: all queries
            y_BTHK, lse_BHT = y_part.to(lse_part.dtype), lse_part
        else:
            _merge(y_BTHK[:, part.queries], lse_BHT[:, :, part.queries], y_part, lse_part)
    return y_BTHK, lse_BHT


def _around_again(
    steps: Iterable[tuple[Part, Chunk]], *, merged: tuple[Tensor, Tensor, Tensor], axis: Axis
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward walk with the merged dy, y and lse: dq_BTHK, dk_BSGK and dv_BSGK, in fp32 or wider."""
    dy_BTHK, y_BTHK, lse_BHT = merged
    dq_BTHK, coming = torch.empty(0), Coming(())
    for number, (part, chunk) in enumerate(steps):
        y_part, lse_part = y_BTHK[:, part.queries], lse_BHT[:, :, part.queries]
        parts = attend_backward(chunk, dy_BTHK[:, part.queries], y_BTHK=y_part, lse_BHT=lse_part)
        if number == 0:  # the own block: all queries and keys
            dq_BTHK, dk_BSGK, dv_BSGK = (x.contiguous().to(lse_BHT.dtype) for x in parts)
        else:
            dq_BTHK[:, part.queries] += parts[0]
            dk_BSGK, dv_BSGK = coming.wait()  # what the ranks before this one found for the block
            dk_BSGK[:, part.keys] += parts[1]
            dv_BSGK[:, part.keys] += parts[2]
        coming = pass_on((dk_BSGK, dv_BSGK), axis)  # travels during the next step; after the last one it is home
    dk_BSGK, dv_BSGK = coming.wait()
    return dq_BTHK, dk_BSGK, dv_BSGK


def _steps(qkv: Sequence[Tensor], segment_ids: tuple[Tensor, ...] | None, axis: Axis) -> Iterator[tuple[Part, Chunk]]:
    """The own block, then those of the ranks before; the next block is on its way while the caller works on one."""
    q_BTHK, *held = qkv
    for step in range(axis.size):
        coming = pass_on(tuple(held), axis) if step + 1 < axis.size else Coming(tuple(held))
        source = (axis.rank - step) % axis.size
        part = visible_part(axis.rank, source, q_BTHK.shape[1])
        k_BSGK, v_BSGK = (x[:, part.keys] for x in held)
        same_BTS = _same(segment_ids, axis.rank, source, part)
        yield part, Chunk(q_BTHK[:, part.queries], k_BSGK, v_BSGK, part.causal, same_BTS)
        held = coming.wait()


def _same(segment_ids: tuple[Tensor, ...] | None, rank: int, source: int, part: Part) -> Tensor | None:
    """Boolean same_BTS: which of the block's keys lie in the document of the query."""
    if segment_ids is None:
        return None
    return segment_ids[rank][:, part.queries, None] == segment_ids[source][:, None, part.keys]


def _merge(y_BTHK: Tensor, lse_BHT: Tensor, y_part: Tensor, lse_part: Tensor) -> None:
    """Merge a part into y and lse, in place. The own block came first, so lse is finite: a token sees itself."""
    share_BTH1 = torch.sigmoid(lse_part - lse_BHT).transpose(1, 2)[..., None]
    y_BTHK.lerp_(y_part.to(y_BTHK.dtype), share_BTH1)
    lse_BHT.copy_(torch.logaddexp(lse_BHT, lse_part))
