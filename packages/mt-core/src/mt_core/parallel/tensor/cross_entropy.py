"""Output layer and cross-entropy as one function, so that whole logits need never exist; plain, and over a vocabulary
that is cut over an axis.

Shape suffixes: B batch, T tokens, D model size, V vocabulary rows on this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mt_core.distributed.mesh import Axis
from mt_core.parallel.tensor.collectives import all_gather_async
from mt_core.parallel.tensor.linear import ColumnLinear


def cap_logits(logits_BTV: Tensor, softcap: float | None) -> Tensor:
    """Return softcap · tanh(logits / softcap), or the logits themselves if there is no cap."""
    return logits_BTV if softcap is None else softcap * torch.tanh(logits_BTV / softcap)


def linear_cross_entropy(
    x_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    vocab_size: int,
    *,
    softcap: float | None = None,
    bias_V: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy of each label in nats, [B, T], fp32 or wider.

    Rows from `vocab_size` on are padding and never get probability.
    """
    logits_BTV = cap_logits(F.linear(x_BTD, weight_VD, bias_V)[..., :vocab_size], softcap)
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    losses = F.cross_entropy(logits_BTV.flatten(0, 1).to(wide), labels_BT.flatten(), reduction="none")
    return losses.view_as(labels_BT)


@dataclass(frozen=True, slots=True)
class VocabShard:
    """This rank's logits: how many of them are ids, the rest being padding, and their cap."""

    ids: int
    softcap: float | None


def compute_statistics(logits_BTV: Tensor, labels_BT: Tensor, shard: VocabShard) -> Tensor:
    """Return [2, B, T], fp32 or wider: log Σ exp over this rank's ids, and the label's logit; −inf and 0 where it has
    none."""
    scores_BTV = _scores(logits_BTV[..., : shard.ids], shard)
    if not shard.ids:
        nothing_BT = scores_BTV.new_zeros(labels_BT.shape)
        return torch.stack((nothing_BT - torch.inf, nothing_BT))
    highest_BT = scores_BTV.amax(-1)
    lse_BT = highest_BT + (scores_BTV - highest_BT[..., None]).exp().sum(-1).log()
    inside_BT = (labels_BT >= 0) & (labels_BT < shard.ids)
    label_BT = scores_BTV.gather(-1, labels_BT.where(inside_BT, 0)[..., None])[..., 0]
    return torch.stack((lse_BT, label_BT.where(inside_BT, 0)))


def compute_gradient_(logits_BTV: Tensor, lse_BT: Tensor, labels_BT: Tensor, g_BT: Tensor, shard: VocabShard) -> Tensor:
    """Turn logits into the gradient of the loss, in place: g · (softmax − [label]), times the slope of the cap."""
    scores_BTV = _scores(logits_BTV, shard)
    columns_V = torch.arange(scores_BTV.shape[-1], device=labels_BT.device)
    d_BTV = (scores_BTV - lse_BT[..., None]).exp_()
    d_BTV.sub_((columns_V == labels_BT[..., None]).to(d_BTV.dtype)).mul_(g_BT[..., None])
    if shard.softcap is not None:
        d_BTV.mul_(1 - (scores_BTV / shard.softcap).square())
    return logits_BTV.copy_(d_BTV.where(columns_V < shard.ids, 0))


def _scores(logits_BTV: Tensor, shard: VocabShard) -> Tensor:
    return cap_logits(logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)), shard.softcap)


@dataclass(frozen=True, slots=True)
class CrossEntropyKernels:
    """The two passes over the logits."""

    statistics: Callable[..., Tensor] = compute_statistics
    gradient_: Callable[..., Tensor] = compute_gradient_


def compile_kernels() -> CrossEntropyKernels:
    """Compile both passes: each reads the logits once and keeps nothing else of their size."""
    return CrossEntropyKernels(torch.compile(compute_statistics), torch.compile(compute_gradient_))


@dataclass(frozen=True, slots=True)
class VocabCrossEntropy:
    """`linear_cross_entropy` with the rows of the weight cut over the axis (arXiv:1909.08053, §3).

    One copy of the logits exists, in the dtype of the product, and backward turns it into its gradient. On an axis of
    size 1 it is the fused implementation of the plain function.
    """

    axis: Axis
    sequence: bool
    kernels: CrossEntropyKernels = CrossEntropyKernels()

    def __call__(
        self,
        x_BTD: Tensor,
        weight_VD: Tensor,
        labels_BT: Tensor,
        vocab_size: int,
        *,
        softcap: float | None = None,
        bias_V: Tensor | None = None,
    ) -> Tensor:
        """Return what the plain function does; x is this rank's part of the sequence under sequence parallelism."""
        logits_BTV = ColumnLinear(self.axis, self.sequence)(x_BTD, weight_VD, bias_V)
        start, rows = self.axis.rank * weight_VD.shape[0], weight_VD.shape[0]
        shard = VocabShard(min(max(vocab_size - start, 0), rows), softcap)
        return _CrossEntropy.apply(logits_BTV, labels_BT - start, shard, self)  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, labels_BT: Tensor, shard: VocabShard, op: VocabCrossEntropy) -> Tensor:
        """`labels_BT` count from this rank's first row; those of other ranks are outside."""
        local_XBT = op.kernels.statistics(logits_BTV, labels_BT, shard)  # X: log-sum-exp, logit of the label
        lse_NBT, label_NBT = all_gather_async(local_XBT[None], op.axis, 0)().unbind(1)
        lse_BT = lse_NBT.logsumexp(0)
        ctx.save_for_backward(logits_BTV, lse_BT, labels_BT)
        ctx.shard, ctx.kernels = shard, op.kernels
        return lse_BT - label_NBT.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.kernels.gradient_(*ctx.saved_tensors, gradients[0], ctx.shard), None, None, None
