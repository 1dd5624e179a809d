"""Optimizers by name, over Megatron's two parameter groups: matrices decay, biases and vectors do not."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mt_core.config.sections import OptimConfig


def parameter_groups(
    main_params: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups: weight decay for matrices; none for names ending in `.bias` and one-dimensional parameters.

    `shapes` are those of the whole parameters: a rank's main parameter may be a flat part. A rank that has none gets
    an empty parameter, so that every rank has an optimizer.
    """
    decays = {name: len(shapes[name]) > 1 and not name.endswith(".bias") for name in main_params}
    groups = [
        {"params": [p for n, p in main_params.items() if decays[n]], "weight_decay": weight_decay},
        {"params": [p for n, p in main_params.items() if not decays[n]], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]] or [{"params": [nn.Parameter(torch.empty(0))]}]


def adamw(groups: Iterable[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, config.lr, betas, config.eps, fused=True)
