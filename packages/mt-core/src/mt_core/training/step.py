"""One optimizer step, and one evaluation: the only definition of the loss.

Loss = sum over valid tokens ÷ valid tokens of the whole step, over all micro-batches and ranks, so neither
micro-batches nor data parallelism change it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mt_core.parallel.axis import Axis
from mt_core.parallel.replicate import sum_gradients
from mt_core.training.weights import Weights

Batch = Mapping[str, Tensor]


def summed_loss(model: Any, batch: Batch, device: torch.device) -> Tensor:
    """Sum of the losses of a micro-batch's valid tokens, in nats."""
    tokens_BT, labels_BT, mask_BT = (
        batch[key].to(device, non_blocking=True) for key in ("tokens", "labels", "loss_mask")
    )
    losses_BT = model.token_losses(tokens_BT, labels_BT)
    return (losses_BT * mask_BT.to(losses_BT.dtype)).sum()


def valid_tokens(batches: Sequence[Batch]) -> float:
    """Number of tokens that count in the loss, on this rank."""
    return float(sum(batch["loss_mask"].sum(dtype=torch.float64) for batch in batches))


def backward(model: Any, batches: Sequence[Batch], tokens: float, device: torch.device) -> Tensor:
    """Add up this rank's gradients of the step's loss, over `tokens` of all ranks; returns its share of the loss."""
    total: Any = 0.0
    for batch in batches:
        loss = summed_loss(model, batch, device) / max(tokens, 1.0)
        loss.backward()
        total = total + loss.detach()
    return total


def update(weights: Weights, optimizer: torch.optim.Optimizer, axis: Axis, *, lr: float, clip_norm: float) -> Tensor:
    """Sum gradients over ranks, clip, step, publish. Returns the gradient's norm before clipping."""
    sum_gradients(weights.gradients(), axis)
    limit = clip_norm or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(weights.masters.values(), limit)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    weights.zero()
    weights.publish()
    return norm


@torch.no_grad()
def evaluate(model: Any, batches: Sequence[Batch], axis: Axis, device: torch.device) -> float:
    """Mean loss over the valid tokens of these batches on all ranks."""
    model.eval()
    try:
        sums = [summed_loss(model, batch, device).double().cpu() for batch in batches]
    finally:
        model.train()
    pair = axis.sum_(torch.tensor([float(sum(sums)), valid_tokens(batches)], dtype=torch.float64))
    return float(pair[0] / pair[1])
