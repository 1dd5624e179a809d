"""Choices of experts: how many fall on each, and which of them are kept where an expert takes so many and no more.

Shape suffixes: B batch, T tokens, E experts, C choices of a token.
"""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot(chosen: Tensor, experts: int) -> Tensor:
    """Which expert each choice is, boolean […, E]; unlike `bincount`, it does not wait for the GPU."""
    return chosen[..., None] == torch.arange(experts, device=chosen.device)


def leave_out_padding(chosen_BTC: Tensor, mask_BT: Tensor | None, experts: int) -> Tensor:
    """The choices, those of padding being number `experts`, which is that of no expert; the mask is False there."""
    return chosen_BTC if mask_BT is None else chosen_BTC.where(mask_BT[..., None], experts)


def count_choices(chosen_BTC: Tensor, experts: int) -> Tensor:
    """How often each sequence chooses each expert, int64 [B, E]; padding chooses none."""
    return one_hot(chosen_BTC.flatten(1), experts).sum(1)


def compute_capacity(chosen_BTC: Tensor, experts: int, factor: float) -> Tensor:
    """Tokens of each whole sequence that an expert takes, [B]: `factor` times an equal part of choices, rounded up."""
    tokens_B = (chosen_BTC[..., 0] < experts).sum(1).double()
    return (tokens_B * chosen_BTC.shape[-1] / experts * factor).ceil()


def compute_full_capacity(tokens: int, choices: int, experts: int, factor: float) -> int:
    """The capacity of a whole sequence of so many tokens without padding, than which none of that length has more."""
    return ceil(tokens * choices / experts * factor)


def keep_within_capacity(chosen_BTC: Tensor, weights_BTC: Tensor | None, experts: int, capacity_B: Tensor) -> Tensor:
    """Which choices are among the first `capacity` of their expert in their sequence, boolean [B, T, C].

    The first are those of the highest weights, the earlier token of two equal ones; without weights, the earliest.
    Choices of padding, whose number is `experts`, are not kept, and take no place.
    """
    chosen_BTE = one_hot(chosen_BTC, experts + 1).any(-2)
    if weights_BTC is not None:
        weights_BTE = weights_BTC.new_full(chosen_BTE.shape, -torch.inf).scatter(-1, chosen_BTC, weights_BTC)
        place_BTE = weights_BTE.argsort(dim=1, descending=True, stable=True).argsort(1)
    else:
        place_BTE = chosen_BTE.cumsum(1) - 1
    fits_BTE = place_BTE[..., :experts] < capacity_B[:, None, None]
    return F.pad(fits_BTE, (0, 1)).gather(-1, chosen_BTC)
