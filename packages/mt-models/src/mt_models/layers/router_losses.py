"""Losses of a router's: that experts are chosen equally often, and that logits stay small.

Losses are of whole sequences, [B] each, weighted by the share that a sequence's labels have in the loss of the step; so
they do not depend on how a batch is cut. Where ranks share sequences, each has its part of a loss: means are sums over
this rank's tokens, divided by the tokens of the whole sequence.

Shape suffixes: B batch, T tokens, E experts.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class RoutingRecord:
    """What one layer's router gets and leaves behind in one forward pass; recomputed, it is given the same again.

    No list holds the records' losses: FSDP2 gives a layer copies of the lists in its arguments.
    """

    def __init__(self, padding_mask_BT: Tensor | None = None) -> None:
        self.padding_mask_BT = padding_mask_BT
        """0 where a token is padding, on all tokens of this context rank; without it, none is."""
        self.counted = False
        """Whether the router has counted the choices of this pass."""
        self.shares_BE: Tensor | None = None
        """Share of choices that fell on each expert, which the balance loss evens out; None until they are counted."""
        self.tokens_B: Tensor | None = None
        """Tokens of each whole sequence, without padding."""
        self.loss_B: Tensor | None = None
        """The losses of each sequence, times their coefficients."""


def load_balancing_loss(
    probabilities_BTE: Tensor, shares_BE: Tensor, tokens_B: Tensor, mask_BT: Tensor | None = None
) -> Tensor:
    """Σ_e E · (share of choices that fell on e) · (mean probability of e) of each sequence, [B]: 1 when all is even.

    The shares have no gradient (arXiv:2101.03961, eq. 4-6; by sequence, arXiv:2405.04434, eq. 12-14).
    """
    means_BE = average_tokens(probabilities_BTE, tokens_B, mask_BT)
    return probabilities_BTE.shape[-1] * (shares_BE.to(means_BE.dtype) * means_BE).sum(-1)


def z_loss(logits_BTE: Tensor, tokens_B: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Mean square of the logarithm of the sum of exponentials over each sequence, [B] (arXiv:2202.08906, eq. 5)."""
    return average_tokens(logits_BTE.logsumexp(-1, keepdim=True).square(), tokens_B, mask_BT).squeeze(-1)


def average_tokens(x_BTE: Tensor, tokens_B: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The sum over this rank's tokens that are no padding, divided by those of the whole sequence, [B, E]."""
    if mask_BT is not None:
        x_BTE = x_BTE.where(mask_BT[..., None], 0)
    return x_BTE.sum(1) / tokens_B.to(x_BTE.dtype).clamp(min=1)[:, None]


def sum_aux_losses(losses: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of the losses of several layers, [B]; None if there is none."""
    total_B = None
    for loss_B in losses:
        if loss_B is not None:
            total_B = loss_B if total_B is None else total_B + loss_B
    return total_B


def attach_aux_losses(losses_BT: Tensor, aux_B: Tensor | None) -> Tensor:
    """The losses unchanged, but their gradient also flows into the auxiliary losses, as if each token's had those.

    So an auxiliary loss is weighted by the share that its sequence's tokens have in the loss of the step.
    """
    return losses_BT if aux_B is None else _AttachAuxLosses.apply(losses_BT, aux_B)  # pyright: ignore[reportReturnType]


class _AttachAuxLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses_BT: Tensor, aux_B: Tensor) -> Tensor:
        ctx.dtype = aux_B.dtype
        return losses_BT.view_as(losses_BT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (g_BT,) = gradients
        return g_BT, g_BT.sum(1).to(ctx.dtype)
