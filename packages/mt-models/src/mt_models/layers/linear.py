"""A linear layer whose weight keeps its logical shape: un-fusing is indexing and a shard is a slice of one dim."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = W x + b with W of shape (out…, in…) and b of shape (out…); `in…` are the last dims of x."""

    def __init__(self, into: int | tuple[int, ...], out: int | tuple[int, ...], *, bias: bool = False) -> None:
        super().__init__()
        into, out = (shape if isinstance(shape, tuple) else (shape,) for shape in (into, out))
        self.in_dims = len(into)
        self.weight = nn.Parameter(torch.empty(*out, *into))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None
        self.op: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear

    def forward(self, x: Tensor) -> Tensor:
        """[…, in…] to […, out…]."""
        out, into = self.weight.shape[: -self.in_dims], self.weight.shape[-self.in_dims :]
        weight = self.weight.reshape(math.prod(out), math.prod(into))
        bias = None if self.bias is None else self.bias.flatten()
        return self.op(x.flatten(-self.in_dims), weight, bias).unflatten(-1, out)
