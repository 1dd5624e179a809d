"""Normalisation over the last dim. Statistics are computed in fp32 for narrower inputs, as torch's kernels do."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_models import config


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
