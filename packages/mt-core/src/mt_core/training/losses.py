"""The losses of one micro-batch summed up, and the metrics of several added up."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mt_core.contracts import Losses, MetricSum


class LossSums(NamedTuple):
    """Sums over one micro-batch on this rank, in nats."""

    tokens: Tensor | None
    """The losses of its valid tokens; None if the model has no losses of tokens."""
    samples: Tensor | None
    """The losses of its samples; None if the model has none."""
    metrics: dict[str, Tensor]
    """By name, [total, weight] in fp64."""

    def mean(self, tokens: float, samples: float) -> Tensor:
        """Return this micro-batch's part of the mean over `tokens` tokens plus the mean over `samples` samples."""
        parts = [] if self.tokens is None else [self.tokens / max(tokens, 1.0)]
        parts += [] if self.samples is None else [self.samples / samples]
        assert parts, "a model has losses of tokens, of samples or of both"
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def add_up_losses(losses: Losses, mask_BT: Tensor | None) -> LossSums:
    """Sum up losses over the tokens that count, and prepare their metrics for `add_metrics`."""
    tokens, samples, metrics = losses.tokens, losses.samples, {**losses.metrics}
    if tokens is not None:
        valid_BT = torch.ones_like(tokens) if mask_BT is None else mask_BT.to(tokens.dtype)
        tokens = (tokens * valid_BT).sum()
        metrics |= _name_sum(losses.tokens_name, tokens, valid_BT)
    if samples is not None:
        weights_B, samples = torch.ones_like(samples), samples.sum()
        metrics |= _name_sum(losses.samples_name, samples, weights_B)
    sums = {name: torch.stack((m.total, m.weight)).detach().double() for name, m in metrics.items()}
    return LossSums(tokens, samples, sums)


def _name_sum(name: str | None, total: Tensor, weights: Tensor) -> dict[str, MetricSum]:
    """The metric of a named sum."""
    return {} if name is None else {name: MetricSum(total, weights.sum(dtype=torch.float64).to(total.dtype))}


def add_metrics(sums: dict[str, Tensor], metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the metrics of one more micro-batch to the sums."""
    return sums | {name: sums[name] + value if name in sums else value for name, value in metrics.items()}
