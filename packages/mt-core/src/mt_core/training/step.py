"""One optimizer step, and one evaluation: the only definition of the loss.

Loss = sum over valid tokens ÷ valid tokens of the whole step, over all micro-batches and ranks, so neither
micro-batches nor any kind of parallelism change it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mt_core.parallel.data_parallel import DataParallel
from mt_core.parallel.gradients import global_norm, norms, sum_partial
from mt_core.parallel.mesh import Mesh
from mt_core.training.inputs import Batch, inputs, valid_tokens


class Update(NamedTuple):
    """What one step found, on the model's device."""

    norm: Tensor
    """Of the whole gradient, before clipping."""
    own_norms: Tensor
    """Of the gradients of this rank's masters, in their order."""


def summed_loss(model: Any, batch: Batch, mesh: Mesh, device: torch.device) -> Tensor:
    """Sum of the losses of this rank's valid tokens of a micro-batch, in nats."""
    part = inputs(batch, mesh.context, device)
    losses_BT = model.token_losses(
        part.tokens_BT, part.labels_BT, positions=part.positions, documents_BT=part.documents_BT
    )
    return (losses_BT * part.loss_mask_BT.to(losses_BT.dtype)).sum()


def backward(
    model: Any,
    engine: DataParallel,
    batches: Sequence[Batch],
    tokens: float,
    device: torch.device,
    *,
    scale: float = 1.0,
    beat: Callable[[], None] = lambda: None,
) -> Tensor:
    """Add up this rank's gradients of `scale` × the step's loss, over `tokens` of all ranks; its share of the loss.

    `beat` is called before each micro-batch.
    """
    total: Any = 0.0
    engine.begin_step()
    for number, batch in enumerate(batches, 1):
        beat()
        if number == len(batches):
            engine.last_backward()
        loss = summed_loss(model, batch, engine.mesh, device) / max(tokens, 1.0)
        (loss * scale).backward()
        total = total + loss.detach()
    return total


def reduce(engine: DataParallel) -> None:
    """Make every master's gradient that of the whole step, over all ranks."""
    engine.reduce()
    sum_partial(engine)


def update(
    engine: DataParallel, optimizer: torch.optim.Optimizer, *, lr: float, clip_norm: float, scale: float = 1.0
) -> Update:
    """Clip reduced gradients, step, publish. A gradient that is not finite changes no weight."""
    own_norms = norms(engine) / scale
    norm = global_norm(engine, own_norms)
    factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0) if clip_norm else torch.ones_like(norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    _step(optimizer, factor / scale, ~norm.isfinite())
    engine.publish()
    return Update(norm, own_norms)


def _step(optimizer: Any, factor: Tensor, bad: Tensor) -> None:
    """A step with gradients × factor, unless they are bad. torch's fused kernels do both without waiting for a GPU."""
    fused = optimizer.defaults.get("fused")
    if fused and factor.dtype == torch.float32:
        optimizer.grad_scale = factor.reciprocal()
    else:
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
    if fused:
        optimizer.found_inf = bad.float()
    if fused or not bad:
        optimizer.step()


@torch.no_grad()
def evaluate(
    model: Any,
    batches: Sequence[Batch],
    mesh: Mesh,
    device: torch.device,
    *,
    beat: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss over the valid tokens of these batches on all ranks; `beat` is called after each."""
    model.eval()
    sums = []
    try:
        for batch in batches:
            sums.append(summed_loss(model, batch, mesh, device).double().cpu())
            beat()
    finally:
        model.train()
    tokens = valid_tokens(batches) / mesh.context.size
    pair = mesh.tokens.sum_(torch.tensor([float(sum(sums)), tokens], dtype=torch.float64))
    return float(pair[0] / pair[1])
