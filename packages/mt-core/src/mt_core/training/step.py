"""One optimizer step, and one evaluation: the only definition of the loss.

Loss = sum over valid tokens ÷ valid tokens of the whole step, over all micro-batches and ranks, so neither
micro-batches nor any kind of parallelism change it. A model that also has a loss of each sample adds their mean over
the samples of the step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mt_core.distributed.mesh import Mesh
from mt_core.parallel.data.grad_norm import global_norm, norms, sum_partial
from mt_core.parallel.data.protocol import DataParallel
from mt_core.training.inputs import Batch, inputs, valid_tokens


class Update(NamedTuple):
    """What one step found, on the model's device."""

    norm: Tensor
    """Of the whole gradient, before clipping."""
    own_norms: Tensor
    """Of the gradients of this rank's masters, in their order."""


class Sums(NamedTuple):
    """Of one micro-batch, in nats."""

    tokens: Tensor
    """The losses of this rank's valid tokens."""
    samples: Tensor | None
    """The losses of its samples, if the model has any."""

    def over(self, tokens: float, samples: float) -> Tensor:
        """Their part of the means over so many tokens and samples."""
        mean = self.tokens / max(tokens, 1.0)
        return mean if self.samples is None else mean + self.samples / samples


def summed_losses(model: Any, batch: Batch, mesh: Mesh, device: torch.device) -> Sums:
    """The sums of a micro-batch's losses on this rank."""
    part = inputs(batch, mesh.context, device)
    found = model.token_losses(
        part.tokens_BT, part.labels_BT, positions=part.positions, documents_BT=part.documents_BT, **part.more
    )
    losses_BT, losses_B = found if isinstance(found, tuple) else (found, None)
    tokens = (losses_BT * part.loss_mask_BT.to(losses_BT.dtype)).sum()
    return Sums(tokens, None if losses_B is None else losses_B.sum())


def samples_of(batches: Sequence[Batch]) -> int:
    """Number of samples in micro-batches."""
    return sum(len(batch["labels"]) for batch in batches)


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
    samples = samples_of(batches) * engine.mesh.data.size
    engine.begin_step()
    for number, batch in enumerate(batches, 1):
        beat()
        if number == len(batches):
            engine.last_backward()
        loss = summed_losses(model, batch, engine.mesh, device).over(tokens, samples)
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
    """Mean loss over the valid tokens of these batches on all ranks, and samples; `beat` is called after each."""
    model.eval()
    tokens, samples = valid_tokens(batches) / mesh.context.size, float(samples_of(batches))
    of_tokens, of_samples = 0.0, 0.0
    try:
        for batch in batches:
            sums = summed_losses(model, batch, mesh, device)
            of_tokens += float(sums.tokens.double())
            of_samples += 0.0 if sums.samples is None else float(sums.samples.double())
            beat()
    finally:
        model.train()
    totals = mesh.tokens.sum_(torch.tensor([of_tokens, tokens, of_samples, samples], dtype=torch.float64))
    return float(totals[0] / totals[1] + totals[2] / totals[3])
