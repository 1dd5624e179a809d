"""Attention of some queries to some keys that also returns its log-sum-exp, so that parts can be merged exactly.

With s = q kᵀ / √K over the visible keys: `lse = log Σ exp s`, `y = exp(s − lse) v`. Two parts over disjoint keys merge
to lse = log(exp lse₁ + exp lse₂), y = exp(lse₁ − lse) y₁ + exp(lse₂ − lse) y₂. The backward of a part needs only the
merged y and lse: with P = exp(s − lse), D = Σ_K dy·y: dv = Pᵀ dy, ds = P (dy vᵀ − D), dq = ds k / √K, dk = dsᵀ q / √K.
Dropout with a mask M, which is 1 / (1 − rate) or 0, leaves lse as it is: y = (M P) v, dv = (M P)ᵀ dy, and
ds = P (M (dy vᵀ) − D) with the same D.
Two implementations: matmuls here, for any device, dtype and mask; fused CUDA kernels in `fused_kernels.py`.

Shape suffixes: B batch, T queries, S keys, H = G·R query heads, G key/value groups, R queries per group, K head size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mt_core.parallel.context.fused_kernels import Kernel, select_kernel
from mt_core.parallel.dropout import ProbabilityDropout, drop_probabilities


@dataclass(frozen=True, slots=True)
class Chunk:
    """Queries, the keys and values they meet, and which of those they see."""

    q_BTHK: Tensor
    k_BSGK: Tensor
    v_BSGK: Tensor
    causal: bool
    """Query i sees keys 0 … i (there are as many keys as queries); otherwise it sees all."""
    same_BTS: Tensor | None = None
    """Boolean: which keys are in the query's document; None if all do."""
    dropout: ProbabilityDropout | None = None
    """Which of these queries' probabilities are dropped."""


def attend(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Return y_BTHK in the dtype of q and lse_BHT in fp32 or wider; −inf (and a zero y) where a query sees no key."""
    kernel = _kernel(chunk)
    if kernel is None:
        return attend_plain(chunk)
    return kernel.forward(chunk.q_BTHK, chunk.k_BSGK, chunk.v_BSGK, causal=chunk.causal)


def attend_backward(chunk: Chunk, dy_BTHK: Tensor, *, y_BTHK: Tensor, lse_BHT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the chunk's share of dq_BTHK, dk_BSGK and dv_BSGK, given the merged y and lse of its queries."""
    kernel = _kernel(chunk)
    if kernel is None:
        return attend_plain_backward(chunk, dy_BTHK, y_BTHK=y_BTHK, lse_BHT=lse_BHT)
    saved = (chunk.q_BTHK, chunk.k_BSGK, chunk.v_BSGK, y_BTHK, lse_BHT)
    return kernel.backward(dy_BTHK, saved, causal=chunk.causal)


def attend_plain(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Do what `attend` does in matmuls; the softmax is computed in fp32 or wider."""
    scores_BGRTS = _scores(chunk)
    lse_BGRT = scores_BGRTS.logsumexp(-1)
    seen_BGRT1 = lse_BGRT.masked_fill(lse_BGRT == -math.inf, 0)[..., None]  # −inf − −inf is not a number
    weights_BGRTS = _drop(scores_BGRTS.sub_(seen_BGRT1).exp_(), chunk).to(chunk.v_BSGK.dtype)
    y_BTGRK = torch.einsum("bgrts,bsgk->btgrk", weights_BGRTS, chunk.v_BSGK)
    return y_BTGRK.flatten(2, 3), lse_BGRT.flatten(1, 2)


def attend_plain_backward(
    chunk: Chunk, dy_BTHK: Tensor, *, y_BTHK: Tensor, lse_BHT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `attend_backward` does in matmuls."""
    groups, dtype = chunk.k_BSGK.shape[2], chunk.q_BTHK.dtype
    q_BTGRK, y_BTGRK, dy_BTGRK = (x.unflatten(2, (groups, -1)) for x in (chunk.q_BTHK, y_BTHK, dy_BTHK))
    weights_BGRTS = (_scores(chunk) - lse_BHT.unflatten(1, (groups, -1))[..., None]).exp_()
    dv_BSGK = torch.einsum("bgrts,btgrk->bsgk", _drop(weights_BGRTS, chunk).to(dtype), dy_BTGRK)
    sums_BTGR = (dy_BTGRK.to(lse_BHT.dtype) * y_BTGRK).sum(-1)
    dweights_BGRTS = _drop(torch.einsum("btgrk,bsgk->bgrts", dy_BTGRK, chunk.v_BSGK), chunk)
    dscores_BGRTS = weights_BGRTS.mul_(dweights_BGRTS - sums_BTGR.permute(0, 2, 3, 1)[..., None])
    dscores_BGRTS = dscores_BGRTS.mul_(_scale(chunk)).to(dtype)
    dq_BTGRK = torch.einsum("bgrts,bsgk->btgrk", dscores_BGRTS, chunk.k_BSGK)
    dk_BSGK = torch.einsum("bgrts,btgrk->bsgk", dscores_BGRTS, q_BTGRK)
    return dq_BTGRK.flatten(2, 3), dk_BSGK, dv_BSGK


def _kernel(chunk: Chunk) -> Kernel | None:
    plain = chunk.same_BTS is not None or chunk.dropout is not None
    return None if plain else select_kernel(chunk.q_BTHK, chunk.k_BSGK, chunk.v_BSGK)


def _drop(x_BGRTS: Tensor, chunk: Chunk) -> Tensor:
    """Multiply by the mask, which is 1 / (1 − rate) or 0."""
    return x_BGRTS if chunk.dropout is None else drop_probabilities(x_BGRTS, chunk.dropout)


def _scale(chunk: Chunk) -> float:
    return 1 / math.sqrt(chunk.q_BTHK.shape[-1])


def _scores(chunk: Chunk) -> Tensor:
    """Compute scaled scores_BGRTS in fp32 or wider, −inf where a key is not seen."""
    q_BTGRK = chunk.q_BTHK.unflatten(2, (chunk.k_BSGK.shape[2], -1))
    scores_BGRTS = torch.einsum("btgrk,bsgk->bgrts", q_BTGRK, chunk.k_BSGK)
    scores_BGRTS = scores_BGRTS.to(torch.promote_types(scores_BGRTS.dtype, torch.float32)) * _scale(chunk)
    if chunk.causal:
        later_TS = torch.ones(scores_BGRTS.shape[-2:], dtype=torch.bool, device=q_BTGRK.device).triu_(1)
        scores_BGRTS.masked_fill_(later_TS, -math.inf)
    if chunk.same_BTS is not None:
        scores_BGRTS.masked_fill_(~chunk.same_BTS[:, None, None], -math.inf)
    return scores_BGRTS
