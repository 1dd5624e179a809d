"""The smallest layers: linear, embedding, output head, norms and the loss of the output layer.

What a layer computes with is its `op` where a parallel implementation can take its place.

Shape suffixes: B batch, T tokens, D hidden size, V vocabulary rows.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_core.parallel.tensor.cross_entropy import linear_cross_entropy
from mt_core.parallel.tensor.plan import used_elsewhere
from mt_models import config


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


class Embedding(nn.Module):
    """Row `i` of `weight` for index `i`. Unlike `nn.Embedding` it draws no random numbers when built."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))
        self.op: Callable[[Tensor, Tensor], Tensor] = F.embedding

    def forward(self, indices: Tensor) -> Tensor:
        """int64 […] to […, size]."""
        return self.op(indices, self.weight)


class Head(nn.Module):
    """What the output layer has of its own: a weight [V, D], a bias [V], or both."""

    def __init__(self, rows: int, size: int, *, weight: bool, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size)) if weight else None
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        self.op = used_elsewhere

    def weights(self, embedding: Embedding) -> tuple[Tensor, Tensor | None]:
        """Weight, the embedding's if it has none, and bias."""
        return embedding.weight if self.weight is None else self.weight, self.bias


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (arXiv:1910.07467); with `offset` the factor is 1 + weight."""

    def __init__(self, part: config.RMSNorm, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.offset = part.eps, part.offset

    def forward(self, x: Tensor) -> Tensor:
        """[…, size] to the same shape."""
        if not self.offset:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)  # 1 + weight would lose half of the weight's bits
        return (F.rms_norm(x.to(wide), self.weight.shape, eps=self.eps) * (1 + self.weight.to(wide))).to(x.dtype)


class LayerNorm(nn.Module):
    """(x − mean) / sqrt(var + eps) · weight + bias (arXiv:1607.06450)."""

    def __init__(self, part: config.LayerNorm, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = part.eps

    def forward(self, x: Tensor) -> Tensor:
        """[…, size] to the same shape."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def make_norm(part: config.RMSNorm | config.LayerNorm, size: int) -> nn.Module:
    """The norm that a configuration part describes."""
    return RMSNorm(part, size) if part.kind == "rms" else LayerNorm(part, size)


class CrossEntropy(nn.Module):
    """Cross-entropy of labels under the logits x · weightᵀ + bias; rows from `vocab_size` on are padding.

    With a `softcap`, logits l become softcap · tanh(l / softcap).
    """

    def __init__(self, vocab_size: int, softcap: float | None = None) -> None:
        super().__init__()
        self.vocab_size, self.softcap = vocab_size, softcap
        self.op: Callable[..., Tensor] = linear_cross_entropy

    def forward(self, x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, bias_V: Tensor | None = None) -> Tensor:
        """In nats, [B, T], fp32 or wider, not reduced."""
        return self.op(x_BTD, weight_VD, labels_BT, self.vocab_size, softcap=self.softcap, bias_V=bias_V)
