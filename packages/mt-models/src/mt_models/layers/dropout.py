"""Dropout in a model: of hidden features, and of attention's probabilities.

`mt_core.parallel.dropout` makes the masks, which are the same under every layout. Both layers do nothing without keys:
a model passes some only in training, and only if it drops anything.

Shape suffixes: B batch, T tokens or queries, S keys, D model size, H heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mt_core.parallel.dropout import (
    DropoutKeys,
    ProbabilityDropout,
    drop_features,
    fold,
    number_heads,
    number_positions,
)

EMBEDDING, DECODER_EMBEDDING, ATTENTION, ATTENTION_OUTPUT, CROSS, CROSS_OUTPUT, MLP_OUTPUT, ROUTER = range(8)
"""The operations of a layer, or before the first, that drop elements, or jitter them as a router does."""


class HiddenDropout(nn.Module):
    """Features of which training sets a share to 0."""

    def __init__(self, rate: float, site: int) -> None:
        super().__init__()
        self.rate, self.site = rate, site
        self.op: Callable[[Tensor, DropoutKeys, float, int], Tensor] = drop_features

    def forward(self, x_BTD: Tensor, keys: DropoutKeys | None) -> Tensor:
        """[B, T, D] to the same shape; the keys are of the layer and of all T tokens that tensor ranks share."""
        return x_BTD if keys is None or not self.rate else self.op(x_BTD, keys, self.rate, self.site)


class AttentionDropout(nn.Module):
    """What an attention core is to drop of its probabilities."""

    def __init__(self, rate: float, site: int) -> None:
        super().__init__()
        self.rate, self.site = rate, site
        self.op: Callable[[int, torch.device], Tensor] = number_heads

    def forward(self, keys: DropoutKeys | None, heads: int, others: int | None = None) -> ProbabilityDropout | None:
        """For a core called with so many heads; `others` is the length of the sequence that keys are from, if it is
        not the queries' own."""
        if keys is None or not self.rate:
            return None
        device = keys.samples_B.device
        keys_S = keys.positions_T if others is None else number_positions(0, others, device)
        samples_B = fold(keys.samples_B, self.site)
        return ProbabilityDropout(self.rate, samples_B, self.op(heads, device), keys.positions_T, keys_S)
