"""T5's relative positions: a learned number per head for each range of distances (arXiv:1910.10683, §2.1).

Shape suffixes: T queries, S keys, H heads; under tensor parallelism H is this rank's share.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_models import config


class RelativeBias(nn.Module):
    """What is added to the scores of every layer of a stack, by the distance from query to key."""

    def __init__(self, part: config.Relative, heads: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(part.buckets, heads))
        self.part, self.bidirectional = part, bidirectional
        self.op: Callable[[Tensor, Tensor], Tensor] = F.embedding

    def forward(self, length: int) -> Tensor:
        """[H, T, S] for a sequence of so many tokens, which are its queries and keys."""
        places_T = torch.arange(length, device=self.weight.device)
        buckets_TS = bucket(places_T - places_T[:, None], self.part, bidirectional=self.bidirectional)
        return self.op(buckets_TS, self.weight).permute(2, 0, 1)


def bucket(distance: Tensor, part: config.Relative, *, bidirectional: bool) -> Tensor:
    """The range in which each distance key − query lies.

    Half of the ranges, or of each direction's, hold one distance each; the others grow like its logarithm up to
    `max_distance`. A causal model has none for keys ahead, which count as distance 0.
    """
    ranges = part.buckets // 2 if bidirectional else part.buckets
    behind, single = (-distance).clamp(min=0), ranges // 2
    far = distance.abs() if bidirectional else behind
    growth = (far.clamp(min=1).float() / single).log() / math.log(part.max_distance / single) * (ranges - single)
    grown = (single + growth.long()).clamp(max=ranges - 1)
    return torch.where(far < single, far, grown) + (ranges * (distance > 0) if bidirectional else 0)
