"""Output layer and cross-entropy as one function, so that whole logits need never exist; plain, and over a vocabulary
that is cut over an axis.

Shape suffixes: B batch, T tokens, D model size, V vocabulary rows on this rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mt_core.parallel.axis import Axis
from mt_core.parallel.linear import ColumnLinear


def capped(logits_BTV: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(logits / softcap), or the logits themselves if there is no cap."""
    return logits_BTV if softcap is None else softcap * torch.tanh(logits_BTV / softcap)


def linear_cross_entropy(
    x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, vocab_size: int, *, softcap: float | None = None
) -> Tensor:
    """Cross-entropy of each label in nats, [B, T], fp32 or wider; rows from `vocab_size` on never get probability."""
    logits_BTV = capped(F.linear(x_BTD, weight_VD)[..., :vocab_size], softcap)
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    losses = F.cross_entropy(logits_BTV.flatten(0, 1).to(wide), labels_BT.flatten(), reduction="none")
    return losses.view_as(labels_BT)


@dataclass(frozen=True, slots=True)
class VocabCrossEntropy:
    """`linear_cross_entropy` with the rows of the weight cut over the axis (arXiv:1909.08053, §3).

    Two reductions of [B, T] numbers forward, none backward.
    """

    axis: Axis
    sequence: bool

    def __call__(
        self, x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, vocab_size: int, *, softcap: float | None = None
    ) -> Tensor:
        """As the plain function; x is this rank's part of the sequence under sequence parallelism."""
        logits_BTV = capped(ColumnLinear(self.axis, self.sequence)(x_BTD, weight_VD, None), softcap)
        wide = torch.promote_types(logits_BTV.dtype, torch.float32)
        start, rows = self.axis.rank * weight_VD.shape[0], weight_VD.shape[0]
        logits_BTV = logits_BTV.to(wide)
        if start + rows > vocab_size:
            padding_V = torch.arange(start, start + rows, device=x_BTD.device) >= vocab_size
            logits_BTV = logits_BTV.masked_fill(padding_V, -torch.inf)
        return _CrossEntropy.apply(logits_BTV, labels_BT - start, self.axis)  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, labels_BT: Tensor, axis: Axis) -> Tensor:
        """`labels_BT` count from this rank's first row; those of other ranks lie outside."""
        highest_BT = axis.max_(logits_BTV.amax(-1))
        inside_BT = (labels_BT >= 0) & (labels_BT < logits_BTV.shape[-1])
        rows_BT1 = labels_BT.where(inside_BT, 0)[..., None]
        label_BT = (logits_BTV.gather(-1, rows_BT1)[..., 0] - highest_BT).where(inside_BT, 0)
        weights_BTV = (logits_BTV - highest_BT[..., None]).exp_()
        total_BT, label_BT = axis.sum_(torch.stack((weights_BTV.sum(-1), label_BT)))
        ctx.save_for_backward(weights_BTV.div_(total_BT[..., None]), rows_BT1, inside_BT)
        return total_BT.log() - label_BT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        probabilities_BTV, rows_BT1, inside_BT = ctx.saved_tensors
        g_BTV = probabilities_BTV.scatter_add(-1, rows_BT1, -inside_BT[..., None].to(probabilities_BTV.dtype))
        return g_BTV.mul_(gradients[0][..., None]), None, None
