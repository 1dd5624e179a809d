"""One optimizer step, and one evaluation: the only definition of the loss.

Loss = sum over valid tokens ÷ valid tokens of the whole step, over all micro-batches and ranks, so neither
micro-batches nor any kind of parallelism change it. A model that has a loss of each sample adds their mean over the
samples of the step; one without losses of tokens has that alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mt_core.contracts import Losses, Model
from mt_core.distributed.mesh import Mesh
from mt_core.parallel.data.grad_norm import global_norm, norms, sum_partial
from mt_core.parallel.data.protocol import DataParallel
from mt_core.training.inputs import Batch, prepare_inputs, valid_tokens


class Update(NamedTuple):
    """What one step found, on the model's device."""

    norm: Tensor
    """Of the whole gradient, before clipping."""
    own_norms: Tensor
    """Of the gradients of this rank's masters, in their order."""


class StepLosses(NamedTuple):
    """What the backward passes of one step sum up on this rank."""

    loss: Tensor
    """This rank's share of the step's loss, in nats."""
    metrics: dict[str, Tensor]
    """By name, [total, weight] in fp64."""


class LossSums(NamedTuple):
    """Sums over one micro-batch on this rank, in nats."""

    tokens: Tensor | None
    """The losses of its valid tokens; None if the model has no losses of tokens."""
    samples: Tensor | None
    """The losses of its samples; None if the model has none."""
    metrics: dict[str, Tensor]
    """By name, [total, weight] in fp64."""

    def mean(self, tokens: float, samples: float) -> Tensor:
        """Their part of the mean over so many tokens plus the mean over so many samples."""
        parts = [] if self.tokens is None else [self.tokens / max(tokens, 1.0)]
        parts += [] if self.samples is None else [self.samples / samples]
        assert parts, "a model has losses of tokens, of samples or of both"
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def sum_losses(model: Model, batch: Batch, mesh: Mesh, device: torch.device) -> LossSums:
    """Sum up the losses and metrics of a micro-batch on this rank."""
    arguments, mask_BT = prepare_inputs(model, batch, mesh.context, device)
    losses: Losses = model.losses(**arguments)
    tokens = losses.tokens
    if tokens is not None:
        tokens = (tokens if mask_BT is None else tokens * mask_BT.to(tokens.dtype)).sum()
    metrics = {name: torch.stack((m.total, m.weight)).detach().double() for name, m in losses.metrics.items()}
    return LossSums(tokens, None if losses.samples is None else losses.samples.sum(), metrics)


def add_metrics(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of metrics with those of one more micro-batch."""
    return sums | {name: sums[name] + value if name in sums else value for name, value in more.items()}


def reduce_metrics(mesh: Mesh, metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Each metric over all ranks, total ÷ weight; one without weight is left out. Every rank must call it."""
    if not metrics:
        return {}
    names = sorted(metrics)
    sums = mesh.data_context.sum_(torch.stack([metrics[name] for name in names])).tolist()
    return {name: total / weight for name, (total, weight) in zip(names, sums, strict=True) if weight}


def count_samples(batches: Sequence[Batch]) -> int:
    """Count the samples in micro-batches."""
    return sum(len(batch["labels"]) for batch in batches)


def backward(
    model: Model,
    engine: DataParallel,
    batches: Sequence[Batch],
    tokens: float,
    device: torch.device,
    *,
    scale: float = 1.0,
    beat: Callable[[], None] = lambda: None,
) -> StepLosses:
    """Add up this rank's gradients of `scale` × the step's loss, over `tokens` of all ranks.

    `beat` is called before each micro-batch.
    """
    total, metrics = torch.zeros((), device=device), {}
    samples = count_samples(batches) * engine.mesh.data_context.size
    engine.begin_step()
    for number, batch in enumerate(batches, 1):
        beat()
        if number == len(batches):
            engine.last_backward()
        sums = sum_losses(model, batch, engine.mesh, device)
        loss = sums.mean(tokens, samples)
        (loss * scale).backward()
        total, metrics = total + loss.detach(), add_metrics(metrics, sums.metrics)
    return StepLosses(total, metrics)


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
            if gradients:  # a rank may have no part of any master
                torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
    if fused:
        optimizer.found_inf = bad.float()
    if fused or not bad:
        optimizer.step()


@torch.no_grad()
def evaluate(
    model: Model,
    batches: Sequence[Batch],
    mesh: Mesh,
    device: torch.device,
    *,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean `loss` over the valid tokens and samples of these batches on all ranks, and the model's metrics by name.

    `beat` is called after each batch.
    """
    model.eval()
    tokens, samples = valid_tokens(batches) / mesh.context.size, float(count_samples(batches))
    token_losses, sample_losses, metrics = 0.0, 0.0, {}
    try:
        for batch in batches:
            sums = sum_losses(model, batch, mesh, device)
            token_losses += 0.0 if sums.tokens is None else float(sums.tokens.double())
            sample_losses += 0.0 if sums.samples is None else float(sums.samples.double())
            metrics = add_metrics(metrics, sums.metrics)
            beat()
    finally:
        model.train()
    totals = mesh.data_context.sum_(torch.tensor([token_losses, tokens, sample_losses, samples], dtype=torch.float64))
    loss = float(totals[0] / max(totals[1], 1.0) + totals[2] / totals[3])
    return {"loss": loss, **reduce_metrics(mesh, metrics)}
