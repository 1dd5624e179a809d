"""A table of vectors looked up by index: token embeddings and learned positions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """Row `i` of `weight` for index `i`. Unlike `nn.Embedding` it draws no random numbers when built."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))
        self.op: Callable[[Tensor, Tensor], Tensor] = F.embedding

    def forward(self, indices: Tensor) -> Tensor:
        """int64 […] to […, size]."""
        return self.op(indices, self.weight)
