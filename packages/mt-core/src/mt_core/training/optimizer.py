"""Optimizers by name, over Megatron's two parameter groups: matrices decay, biases and vectors do not."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mt_core.config.sections import OptimConfig


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weight decay for matrices; none for names ending in `.bias` and one-dimensional parameters."""
    decays = {name: p.dim() > 1 and not name.endswith(".bias") for name, p in parameters.items()}
    return [
        {"params": [p for n, p in parameters.items() if decays[n]], "weight_decay": weight_decay},
        {"params": [p for n, p in parameters.items() if not decays[n]], "weight_decay": 0.0},
    ]


def adamw(groups: Iterable[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], config.lr, betas, config.eps, fused=True)
