"""Normalisation over the last dim. Statistics are computed in fp32 for narrower inputs, as torch's kernels do."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_models import config


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[…, size] to the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x − mean) / sqrt(var + eps) · weight + bias (arXiv:1607.06450)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[…, size] to the same shape."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


KINDS = {"rms": RMSNorm, "layer": LayerNorm}


def make_norm(part: config.RMSNorm | config.LayerNorm, size: int) -> nn.Module:
    """The norm that a configuration part describes."""
    return KINDS[part.kind](size, part.eps)
