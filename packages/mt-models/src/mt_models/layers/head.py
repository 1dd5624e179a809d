"""The output layer of a language model, for those whose weight may be the embedding's while a bias is its own."""

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """What the output layer has of its own: a weight [V, D], a bias [V], or both."""

    def __init__(self, rows: int, size: int, *, weight: bool, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size)) if weight else None
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None

    def weights(self, embedding_VD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight, the embedding's if it has none, and bias."""
        return embedding_VD if self.weight is None else self.weight, self.bias
